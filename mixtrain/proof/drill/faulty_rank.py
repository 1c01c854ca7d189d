"""train.py with a fault in its ranks: MIXTRAIN_FAULT names it. Started as a launcher, it starts itself as the ranks.

Rule: faults are put in once everything is built, where a defect of the hardware or the model would show.
"""

from __future__ import annotations

import math
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

from mixtrain.launch import local

AT = 8  # the step in which a fault shows


def main() -> None:
    script = local.TRAIN[-1]
    if "RANK" not in os.environ:
        local.TRAIN = (sys.executable, "-m", "mixtrain.proof.drill.faulty_rank")
    else:
        put_in(FAULTS[os.environ["MIXTRAIN_FAULT"]], int(os.environ["RANK"]))
    runpy.run_path(script, run_name="__main__")


def put_in(fault: Callable[[Any, int], None], rank: int) -> None:
    """Have `fault` called with what is trained, on every rank, before the first step."""
    from mixtrain.training import worker

    begin = worker._run

    def faulty(*arguments: Any) -> None:
        from mixtrain.engine.compat import cpu, megatron_fixes

        megatron_fixes.apply()
        cpu.apply()  # before Megatron-Core is imported, as the run itself does
        from mixtrain.training import resume

        enter = resume.enter

        def entered(plan: Any, ranks: Any, training: Any, *rest: Any) -> Any:
            state = enter(plan, ranks, training, *rest)
            fault(training, rank)
            return state

        resume.enter = entered
        begin(*arguments)

    worker._run = faulty


def routers(training: Any) -> list[Any]:
    from megatron.core.transformer.moe.router import TopKRouter

    return [
        module
        for chunk in training.chunks
        for module in chunk.modules()
        if isinstance(module, TopKRouter)
    ]


def in_step(training: Any, act: Callable[[], None]) -> None:
    """Call `act` before the forward passes of step AT and of no other."""
    chunk = training.chunks[0]
    steps = []
    zero = chunk.zero_grad_buffer

    def counted() -> None:
        steps.append(None)
        zero()
        if len(steps) == AT:
            act()

    chunk.zero_grad_buffer = counted


def nan_router(training: Any, rank: int) -> None:
    """In one step the second layer's router on rank 1 gives weights that are no numbers."""
    router = routers(training)[1]
    gating = router.gating

    def spoil() -> None:
        router.gating = lambda hidden: gating(hidden) * math.nan
        zero = training.optimizer.zero_grad
        calls: list[None] = []

        def healed(*arguments: Any) -> None:
            calls.append(None)
            if len(calls) > 1:  # the next step
                router.gating = gating
            zero(*arguments)

        training.optimizer.zero_grad = healed

    if rank == 1:
        in_step(training, spoil)


def huge_gradient(training: Any, rank: int) -> None:
    """In one step a gradient of rank 1 is a million times too large."""
    parameter = next(training.chunks[0].parameters())

    def enlarge() -> None:
        prepare = training.optimizer.prepare_grads

        def once() -> Any:
            training.optimizer.prepare_grads = prepare
            parameter.main_grad.add_(1e6)
            return prepare()

        training.optimizer.prepare_grads = once

    in_step(training, enlarge)


def collapse(training: Any, rank: int) -> None:
    """Every token goes to the same two experts, in every layer."""
    import torch

    for router in routers(training):
        favour = torch.zeros(router.config.num_moe_experts)
        favour[:2] = 100.0
        router.gating = lambda hidden, gating=router.gating, favour=favour: gating(hidden) + favour


FAULTS = {"nan_router": nan_router, "huge_gradient": huge_gradient, "collapse": collapse}

if __name__ == "__main__":
    main()
