"""mixtrain's own work: forward and backward, or whole steps, of a plan on one random batch.

Rule: the benchmark calls the same functions as a training run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from mixtrain.config.plan import Plan
from mixtrain.engine.compat.prepare import prepare
from mixtrain.proof.bench.batch import microbatches
from mixtrain.proof.bench.memory import Memory
from mixtrain.proof.bench.scenario import Measure
from mixtrain.proof.bench.work import Work
from mixtrain.system.rank_identity import Identity


@contextlib.contextmanager
def started(plan: Plan, identity: Identity, memory: Memory) -> Iterator[Any]:
    """Yield this rank, with Megatron-Core initialized for the plan's device."""
    prepare(plan.config.trainer.accelerator)
    from mixtrain.engine import process_groups
    from mixtrain.training import loop  # noqa: F401  (imports all of Megatron-Core that a step needs)

    memory.begin()
    with process_groups.start(plan, identity) as ranks:
        yield ranks


@contextlib.contextmanager
def training_work(
    plan: Plan, identity: Identity, measure: Measure, memory: Memory
) -> Iterator[Work]:
    """Yield a rank's work: each repeat takes the same whole global batch."""
    with started(plan, identity, memory) as ranks:
        if measure is Measure.step:
            _, once = optimizer_steps(plan, ranks)
            norm = None
        else:
            once, norm = forward_backward_passes(plan, ranks)

        def wait() -> None:
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if identity.world_size > 1:
                torch.distributed.barrier()

        yield Work(once, plan.tokens_per_step, wait, norm)


def optimizer_steps(plan: Plan, ranks: Any):
    """Return (the Training, a function that takes a whole optimizer step as the loop does)."""
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

    return training, once


def forward_backward_passes(plan: Plan, ranks: Any):
    """Return (a function that runs forward and backward, a function for the gradient norm or None).

    Each pass zeroes the gradient buffers first. The norm is only available on one rank.
    """
    from mixtrain.engine import model, optimizer
    from mixtrain.engine.optimizer import Training
    from mixtrain.training import loop

    chunks = optimizer.wrap_for_data_parallel(plan, model.build(plan, ranks.device))
    optimizer.set_schedule_callbacks(plan, chunks, optimizer=None)
    training = Training(chunks, optimizer=None, scheduler=None)
    data = [iter(RepeatedBatch(plan)) for _ in chunks]

    def once() -> dict[str, float]:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        batch = plan.config.trainer.global_batch_size
        total, tokens = loop.run_microbatches(
            plan, ranks, training, data, batch, forward_only=False
        )
        return {"sum": total, "tokens": tokens}

    return once, (lambda: gradient_norm(chunks)) if plan.world_size == 1 else None


def gradient_norm(chunks: list[torch.nn.Module]) -> float:
    """Return the norm of all gradients of a model on one rank."""
    gradients = (parameter.main_grad for chunk in chunks for parameter in chunk.parameters())
    return sum(gradient.double().pow(2).sum().item() for gradient in gradients) ** 0.5


class RepeatedBatch:
    """An endless iterable of the rank's microbatches of one batch."""

    def __init__(self, plan: Plan):
        from megatron.core import parallel_state

        self.batch = list(
            microbatches(
                plan,
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_data_parallel_world_size(),
            )
        )

    def __iter__(self):
        while True:
            yield from self.batch
