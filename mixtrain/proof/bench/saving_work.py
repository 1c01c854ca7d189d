"""The work of saving: a checkpoint, the time an asynchronous save blocks training, or plain files.

Rule: the time includes fsync of everything written. One checkpoint is kept, and no plain file.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mixtrain.config.plan import Plan
from mixtrain.proof.bench.work import Work
from mixtrain.system.rank_identity import Identity


@contextlib.contextmanager
def checkpoint_saves(plan: Plan, identity: Identity, folder: Path, memory) -> Iterator[Work]:
    """Yield the work of saving a model that has taken a step.

    With checkpoint.async_save the time is that for which training is blocked.
    """
    from mixtrain.proof.bench.mixtrain_work import optimizer_steps, started

    plan = replace(plan, config=replace(plan.config, run_dir=str(folder)))
    with started(plan, identity, memory) as ranks:
        training, step = optimizer_steps(plan, ranks)
        from mixtrain.checkpoint.save import Saver
        from mixtrain.checkpoint.state import RunState

        step()
        saver = Saver(plan, ranks, training, lambda _: None)
        number = 0

        def once() -> dict[str, float]:
            nonlocal number
            number += 1
            began = time.perf_counter()
            saver.save(RunState(step=number))
            blocked_seconds = time.perf_counter() - began
            while saver.pending:
                step()
                began = time.perf_counter()
                saver.poll()
                blocked_seconds += time.perf_counter() - began
            return {"seconds": blocked_seconds}

        yield Work(once, plan.checkpoint_bytes)
        saver.drain()


def plain_writes(plan: Plan, folder: Path, files: int) -> Work:
    """Return the work of writing a checkpoint's bytes to plain files, two at a time like a rank."""
    data = memoryview(os.urandom(1 << 26))
    sizes = [plan.checkpoint_bytes // files] * files

    def write(number: int) -> None:
        with open(folder / f"plain_{number}", "wb", buffering=0) as file:
            remaining = sizes[number]
            while remaining:
                remaining -= file.write(data[: min(remaining, len(data))])
            os.fsync(file.fileno())

    def once() -> dict[str, float]:
        began = time.perf_counter()
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(write, range(files)))
        seconds = time.perf_counter() - began
        for number in range(files):
            (folder / f"plain_{number}").unlink()
        return {"seconds": seconds}

    return Work(once, sum(sizes))
