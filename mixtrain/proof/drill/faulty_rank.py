"""train.py with a fault, named by MIXTRAIN_FAULT, in its ranks. The launcher starts it as ranks.

Rule: the fault is injected after everything is built, where a defect of the hardware or the model
would show.
"""

from __future__ import annotations

import math
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

from mixtrain.launch import local

FAULTY_STEP = 8


def main() -> None:
    script = local.TRAIN[-1]
    if "RANK" not in os.environ:
        local.TRAIN = (sys.executable, "-m", "mixtrain.proof.drill.faulty_rank")
    else:
        inject(FAULTS[os.environ["MIXTRAIN_FAULT"]], int(os.environ["RANK"]))
    runpy.run_path(script, run_name="__main__")


def inject(fault: Callable[[Any, int], None], rank: int) -> None:
    """Call `fault` with the Training on every rank before the first step."""
    from mixtrain.training import worker

    original_run = worker._run

    def faulty_run(*arguments: Any) -> None:
        from mixtrain.config.choices import Accelerator
        from mixtrain.engine.compat.prepare import prepare

        prepare(Accelerator.cpu)  # before Megatron-Core is imported, as the run itself does
        from mixtrain.training import resume

        original_enter = resume.enter

        def enter_and_break(plan: Any, ranks: Any, training: Any, *rest: Any) -> Any:
            state = original_enter(plan, ranks, training, *rest)
            fault(training, rank)
            return state

        resume.enter = enter_and_break
        original_run(*arguments)

    worker._run = faulty_run


def routers(training: Any) -> list[Any]:
    from megatron.core.transformer.moe.router import TopKRouter

    return [
        module
        for chunk in training.chunks
        for module in chunk.modules()
        if isinstance(module, TopKRouter)
    ]


def before_faulty_step(training: Any, act: Callable[[], None]) -> None:
    """Call `act` before the forward passes of FAULTY_STEP, once."""
    chunk = training.chunks[0]
    steps = 0
    original_zero = chunk.zero_grad_buffer

    def zero_and_count() -> None:
        nonlocal steps
        steps += 1
        original_zero()
        if steps == FAULTY_STEP:
            act()

    chunk.zero_grad_buffer = zero_and_count


def nan_router(training: Any, rank: int) -> None:
    """In one step the second layer's router on rank 1 gives NaN weights."""
    router = routers(training)[1]
    gating = router.gating

    def break_router() -> None:
        router.gating = lambda hidden: gating(hidden) * math.nan
        original_zero = training.optimizer.zero_grad
        calls = 0

        def zero_and_repair(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 1:  # the next step
                router.gating = gating
            original_zero(*arguments)

        training.optimizer.zero_grad = zero_and_repair

    if rank == 1:
        before_faulty_step(training, break_router)


def huge_gradient(training: Any, rank: int) -> None:
    """In one step 1e6 is added to the first parameter's gradient."""
    parameter = next(training.chunks[0].parameters())

    def enlarge_gradient() -> None:
        original_prepare = training.optimizer.prepare_grads

        def prepare_enlarged() -> Any:
            training.optimizer.prepare_grads = original_prepare
            parameter.main_grad.add_(1e6)
            return original_prepare()

        training.optimizer.prepare_grads = prepare_enlarged

    before_faulty_step(training, enlarge_gradient)


def collapse(training: Any, rank: int) -> None:
    """The router of every layer sends every token to the same two experts."""
    import torch

    for router in routers(training):
        bias = torch.zeros(router.config.num_moe_experts)
        bias[:2] = 100.0
        router.gating = lambda hidden, gating=router.gating, bias=bias: gating(hidden) + bias


FAULTS = {"nan_router": nan_router, "huge_gradient": huge_gradient, "collapse": collapse}

if __name__ == "__main__":
    main()
