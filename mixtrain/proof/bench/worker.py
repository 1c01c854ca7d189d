"""One process of a variant: builds its work, warms up, then takes a turn for every line it reads.

    python -m mixtrain.proof.bench.worker SPEC

Rule: standard output has only the answers, as lines of JSON; output of libraries goes to standard
error. The time of a turn is that of the work alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtrain.config.choices import Accelerator
from mixtrain.proof.bench.memory import Memory
from mixtrain.proof.bench.scenario import Measure
from mixtrain.proof.bench.variants import Variant
from mixtrain.proof.bench.work import Work
from mixtrain.system.rank_identity import Identity


@dataclass(frozen=True)
class WorkerSpec:
    variant: Variant
    identity: Identity
    repeats: int
    warmup: int
    threads: int | None  # of this process
    folder: Path  # of this process


@contextlib.contextmanager
def work_of(spec: WorkerSpec, memory: Memory) -> Iterator[Work]:
    """Yield the work of a variant. Its libraries are imported here."""
    variant = spec.variant
    if "hf" in variant.foreign:
        from mixtrain.proof.bench.transformers_work import forward_backward

        yield forward_backward(variant.plan, variant.foreign["hf"], memory)
    elif "plain" in variant.foreign:
        from mixtrain.proof.bench.saving_work import plain_writes

        yield plain_writes(variant.plan, spec.folder, int(variant.foreign["plain"]["files"]))
    elif variant.measure is Measure.save:
        from mixtrain.proof.bench.saving_work import checkpoint_saves

        with checkpoint_saves(variant.plan, spec.identity, spec.folder, memory) as work:
            yield work
    else:
        from mixtrain.proof.bench.mixtrain_work import training_work

        with training_work(variant.plan, spec.identity, variant.measure, memory) as work:
            yield work


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
    cpu_seconds = time.process_time() - cpu_began
    amount = work.amount * repeats
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "amount": amount,
        "peak_bytes": memory.peak(),
    }


def serve(spec: WorkerSpec, answer: Callable[[dict], None]) -> None:
    import torch

    if spec.threads:
        torch.set_num_threads(spec.threads)
    memory = Memory(gpu=spec.variant.plan.config.trainer.accelerator is Accelerator.gpu)
    with work_of(spec, memory) as work:
        computed = [work.once() for _ in range(max(1, spec.warmup))]
        work.wait()
        if work.norm:
            computed[-1]["norm"] = work.norm()
        answer({"computed": computed, "held_bytes": memory.held()})
        for _ in sys.stdin:
            answer(take_turn(work, memory, spec.repeats))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(result: dict) -> None:
        print(json.dumps(result), file=answers, flush=True)

    serve(pickle.loads(Path(sys.argv[1]).read_bytes()), answer)


if __name__ == "__main__":
    # the spec was pickled with classes of this module, not of __main__
    from mixtrain.proof.bench import worker

    worker.main()
