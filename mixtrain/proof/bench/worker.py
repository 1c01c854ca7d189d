"""One rank of a variant: builds its work, warms up, then takes a turn for every message it gets.

    python -m mixtrain.proof.bench.worker PIPE FOLDER

Rule: the time of a turn is that of the work alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mixtrain.config.choices import Accelerator
from mixtrain.proof.bench import work
from mixtrain.proof.bench.scenario import Measure
from mixtrain.proof.bench.variants import Variant
from mixtrain.proof.bench.work import Work
from mixtrain.system.rank_identity import Identity


class Memory:
    """The memory of this process: on a GPU that of its tensors, else resident memory from Linux.

    Call `begin` before the model is built: what libraries use until then is subtracted.
    """

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.base = 0

    def begin(self) -> None:
        self.base = 0 if self.gpu else _resident("VmRSS")

    def reset_peak(self) -> None:
        if self.gpu:
            return torch.cuda.reset_peak_memory_stats()
        # a container may forbid this; then the peak is over the life of the process
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return peak bytes since `reset_peak`."""
        if self.gpu:
            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM") - self.base

    def held(self) -> int:
        """Return the bytes in use now, between steps."""
        if self.gpu:
            return torch.cuda.memory_allocated()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
        return _resident("VmRSS") - self.base


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE).group(1)) * 1024


@contextlib.contextmanager
def work_of(variant: Variant, identity: Identity, folder: Path, memory: Memory) -> Iterator[Work]:
    plan, foreign = variant.plan, variant.foreign
    if "hf" in foreign:
        yield work.transformers_passes(plan, foreign["hf"], memory.begin)
    elif "plain" in foreign:
        yield work.plain_writes(plan, folder, int(foreign["plain"]["files"]))
    else:
        with work.started(plan, identity, memory.begin) as ranks:
            if variant.measure is Measure.save:
                yield work.checkpoint_saves(plan, ranks, folder)
            elif variant.measure is Measure.step:
                yield work.optimizer_steps(plan, ranks)
            else:
                yield work.passes(plan, ranks)


def take_turn(repeated: Work, memory: Memory, repeats: int) -> dict[str, Any]:
    """Repeat the work; return its seconds, CPU seconds, amount and peak memory."""
    memory.reset_peak()
    seconds = 0.0
    cpu_began = time.process_time()
    for _ in range(repeats):
        repeated.wait()
        started = time.perf_counter()
        result = repeated.once()
        repeated.wait()
        seconds += result.get("seconds", time.perf_counter() - started)
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu_began,
        "amount": repeated.amount * repeats,
        "peak_bytes": memory.peak(),
    }


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    variant, identity, warmup, repeats = pipe.recv()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    memory = Memory(gpu=variant.plan.config.trainer.accelerator is Accelerator.gpu)
    with work_of(variant, identity, Path(sys.argv[2]), memory) as repeated:
        computed = [repeated.once() for _ in range(max(1, warmup))]
        repeated.wait()
        if repeated.norm:
            computed[-1]["norm"] = repeated.norm()
        pipe.send((computed, memory.held()))
        with contextlib.suppress(EOFError):  # the benchmark has no more turns
            while pipe.recv():
                pipe.send(take_turn(repeated, memory, repeats))


if __name__ == "__main__":
    main()
