"""One rank of a variant: builds its work, warms up, then takes a turn for every message it gets.

    python -m mixtrain.proof.bench.worker PIPE FOLDER

Rule: the time of a turn is that of the work alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mixtrain.config.choices import Accelerator
from mixtrain.proof.bench.scenario import Measure
from mixtrain.proof.bench.variants import Variant
from mixtrain.proof.bench.work import Memory, Work
from mixtrain.system.rank_identity import Identity


@contextlib.contextmanager
def work_of(variant: Variant, identity: Identity, folder: Path, memory: Memory) -> Iterator[Work]:
    """Yield the work of a variant. Its libraries are imported here."""
    if "hf" in variant.foreign:
        from mixtrain.proof.bench.transformers_work import forward_backward

        yield forward_backward(variant.plan, variant.foreign["hf"], memory)
        return
    from mixtrain.proof.bench import mixtrain_work

    if "plain" in variant.foreign:
        files = int(variant.foreign["plain"]["files"])
        yield mixtrain_work.plain_writes(variant.plan, folder, files)
        return
    with mixtrain_work.started(variant.plan, identity, memory) as ranks:
        if variant.measure is Measure.save:
            yield mixtrain_work.checkpoint_saves(variant.plan, ranks, folder)
        elif variant.measure is Measure.step:
            yield mixtrain_work.optimizer_steps(variant.plan, ranks)
        else:
            yield mixtrain_work.forward_backward(variant.plan, ranks)


def take_turn(work: Work, memory: Memory, repeats: int) -> dict[str, Any]:
    """Repeat the work; return its seconds, CPU seconds, amount and peak memory."""
    memory.reset_peak()
    seconds = 0.0
    cpu_began = time.process_time()
    for _ in range(repeats):
        work.wait()
        started = time.perf_counter()
        result = work.once()
        work.wait()
        seconds += result.get("seconds", time.perf_counter() - started)
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu_began,
        "amount": work.amount * repeats,
        "peak_bytes": memory.peak(),
    }


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    variant, identity, warmup, repeats = pipe.recv()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    memory = Memory(gpu=variant.plan.config.trainer.accelerator is Accelerator.gpu)
    with work_of(variant, identity, Path(sys.argv[2]), memory) as work:
        computed = [work.once() for _ in range(max(1, warmup))]
        work.wait()
        if work.norm:
            computed[-1]["norm"] = work.norm()
        pipe.send((computed, memory.held()))
        with contextlib.suppress(EOFError):  # the benchmark has no more turns
            while pipe.recv():
                pipe.send(take_turn(work, memory, repeats))


if __name__ == "__main__":
    main()
