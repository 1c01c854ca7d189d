"""mixtrain's own work: forward and backward, whole steps, and saving, of a plan on a random batch.

Rule: the benchmark calls the same functions as a training run. The time of saving includes fsync.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mixtrain.config.choices import Accelerator
from mixtrain.config.plan import Plan
from mixtrain.engine.compat import cpu, megatron_fixes
from mixtrain.proof.bench.work import Memory, Work, microbatches, norm_of
from mixtrain.system.rank_identity import Identity


class RepeatedBatch:
    """An endless iterable of the rank's microbatches of one batch."""

    def __init__(self, plan: Plan):
        from megatron.core.parallel_state import (
            get_data_parallel_rank,
            get_data_parallel_world_size,
        )

        ranks = get_data_parallel_rank(), get_data_parallel_world_size()
        self.batch = list(microbatches(plan, *ranks))

    def __iter__(self):
        while True:
            yield from self.batch


@contextlib.contextmanager
def started(plan: Plan, identity: Identity, memory: Memory) -> Iterator[Any]:
    """Yield this rank, with Megatron-Core initialized for the plan's device."""
    megatron_fixes.apply()
    if plan.config.trainer.accelerator is Accelerator.cpu:
        cpu.apply()
    from mixtrain.engine import process_groups
    from mixtrain.training import loop  # noqa: F401  (imports all of Megatron-Core that a step needs)

    memory.begin()
    with process_groups.start(plan, identity) as ranks:
        yield ranks


def wait_for_ranks() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def optimizer_steps(plan: Plan, ranks: Any) -> Work:
    """Return the work of whole optimizer steps, taken by the training loop, on the same batch."""
    once, _ = step_of(plan, ranks)
    return Work(once, plan.tokens_per_step, wait_for_ranks)


def step_of(plan: Plan, ranks: Any) -> tuple[Callable[[], dict[str, float]], Any]:
    """Return (a function that takes a step as the loop does, the Training that it changes)."""
    from mixtrain.checkpoint.state import RunState
    from mixtrain.engine import model, optimizer
    from mixtrain.training import loop
    from mixtrain.training.bad_steps import norm_check
    from mixtrain.training.signals import StopRequest

    check_norm = norm_check(plan, ranks.device)
    training = optimizer.build(plan, model.build(plan, ranks.device), check_norm)
    logs = SimpleNamespace(say=print)
    run = loop.Loop(plan, ranks, training, {"train": RepeatedBatch(plan)}, logs, RunState())
    stop = StopRequest()

    def once() -> dict[str, float]:
        metrics, _ = run.take_step(run.state.step + 1, stop)
        if metrics["lm_loss"] is None:
            raise RuntimeError(
                f"step {metrics['step']} was skipped, and this benchmark measures no skipped steps"
            )
        return {"sum": metrics["lm_loss"], "tokens": 1, "norm": metrics["grad_norm"]}

    return once, training


def forward_backward(plan: Plan, ranks: Any) -> Work:
    """Return the work of forward and backward, after the gradient buffers are set to zero.

    The norm is only available on one rank.
    """
    from mixtrain.engine import model, optimizer
    from mixtrain.training import loop

    chunks = optimizer.wrap_for_data_parallel(plan, model.build(plan, ranks.device))
    optimizer.set_schedule_callbacks(plan, chunks, optimizer=None)
    training = optimizer.Training(chunks, optimizer=None, scheduler=None)
    data = [iter(RepeatedBatch(plan)) for _ in chunks]
    batch = plan.config.trainer.global_batch_size

    def once() -> dict[str, float]:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        total, tokens = loop.run_microbatches(
            plan, ranks, training, data, batch, forward_only=False
        )
        return {"sum": total, "tokens": tokens}

    def norm() -> float:
        return norm_of(weight.main_grad for chunk in chunks for weight in chunk.parameters())

    return Work(once, plan.tokens_per_step, wait_for_ranks, norm if plan.world_size == 1 else None)


def checkpoint_saves(plan: Plan, ranks: Any, folder: Path) -> Work:
    """Return the work of saving a model that has taken a step; one checkpoint is kept.

    With checkpoint.async_save the time is that for which training is blocked.
    """
    plan = replace(plan, config=replace(plan.config, run_dir=str(folder)))
    step, training = step_of(plan, ranks)
    from mixtrain.checkpoint.save import Saver
    from mixtrain.checkpoint.state import RunState

    step()
    saver = Saver(plan, ranks, training, lambda _: None)
    numbers = itertools.count(1)

    def once() -> dict[str, float]:
        began = time.perf_counter()
        saver.save(RunState(step=next(numbers)))
        blocked_seconds = time.perf_counter() - began
        while saver.pending:
            step()
            began = time.perf_counter()
            saver.poll()
            blocked_seconds += time.perf_counter() - began
        return {"seconds": blocked_seconds}

    return Work(once, plan.checkpoint_bytes)


def plain_writes(plan: Plan, folder: Path, files: int) -> Work:
    """Return the work of writing a checkpoint's bytes to plain files, two at a time like a rank."""
    data = memoryview(os.urandom(1 << 26))
    size = plan.checkpoint_bytes // files
    paths = [folder / f"plain_{number}" for number in range(files)]

    def write(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            remaining = size
            while remaining:
                remaining -= file.write(data[: min(remaining, len(data))])
            os.fsync(file.fileno())

    def once() -> dict[str, float]:
        began = time.perf_counter()
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(write, paths))
        seconds = time.perf_counter() - began
        for path in paths:
            path.unlink()
        return {"seconds": seconds}

    return Work(once, size * files)
