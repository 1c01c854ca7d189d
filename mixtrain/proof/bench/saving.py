"""The work of saving: a checkpoint, the part of an asynchronous one that training waits for, or plain files.

Rule: whatever is written is on the disk (fsync) before the time stops; one checkpoint is kept, and no plain file.
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
def saves(plan: Plan, identity: Identity, folder: Path, memory) -> Iterator[Work]:
    """Checkpoints of a model that has taken a step. With checkpoint.async_save the time is what training is held up."""
    from mixtrain.proof.bench.ours import started, steps

    plan = replace(plan, config=replace(plan.config, run_dir=str(folder)))
    with started(plan, identity, memory) as ranks:
        training, step = steps(plan, ranks)
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
            held_up = time.perf_counter() - began
            while saver.pending:
                step()
                began = time.perf_counter()
                saver.poll()
                held_up += time.perf_counter() - began
            return {"seconds": held_up}

        yield Work(once, plan.checkpoint_bytes)
        saver.drain()


def plain_writes(plan: Plan, folder: Path, files: int) -> Work:
    """As many bytes as a checkpoint of the plan has, in a few files, two at a time as a rank writes its own."""
    data = memoryview(os.urandom(1 << 26))
    sizes = [plan.checkpoint_bytes // files] * files

    def write(number: int) -> None:
        with open(folder / f"plain_{number}", "wb", buffering=0) as file:
            left = sizes[number]
            while left:
                left -= file.write(data[: min(left, len(data))])
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
