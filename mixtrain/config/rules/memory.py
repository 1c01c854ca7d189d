"""Rules about device memory: a rank's state, and the least that its activations take. No torch."""

from __future__ import annotations

from dataclasses import replace

from mixtrain.config import pipeline_split
from mixtrain.config.activations import in_flight
from mixtrain.config.choices import Granularity, RecomputeMethod
from mixtrain.config.memory import GIB
from mixtrain.config.plan import Plan, derive
from mixtrain.config.rules.nearest import Problems, ranks_fit
from mixtrain.config.schema import TrainerConfig

FULL = (
    "trainer.recompute_granularity=full and trainer.recompute_method=uniform and"
    " trainer.recompute_num_layers=1"
)


def state_fits_the_device(plan: Plan) -> Problems:
    memory = plan.config.trainer.device_memory_gib
    if memory is not None and plan.state_bytes > memory * GIB:
        yield (
            f"a rank of pipeline stage {plan.heaviest_stage} holds {plan.state_bytes / GIB:.1f}"
            " GiB of weights, gradients and optimizer state, more than trainer.device_memory_gib ="
            f" {memory:g}; use more nodes or a larger pipeline, or trainer.device_memory_gib=null"
            " to try anyway"
        )


def activations_fit_the_device(plan: Plan) -> Problems:
    """Check state plus activations, unless the state or the layout is refused already."""
    memory = plan.config.trainer.device_memory_gib
    parallel = plan.config.parallel
    if memory is None or plan.state_bytes > memory * GIB or plan.least_bytes <= memory * GIB:
        return
    if not ranks_fit(plan) or pipeline_split.problems(parallel, plan.config.model.num_layers):
        return
    stage = plan.fullest_stage
    passes = len(in_flight(len(plan.layers), stage, len(plan.layers[stage]), plan.num_microbatches))
    use = [*_remedies(plan), "more TP or CP", "trainer.device_memory_gib=null to try anyway"]
    state = plan.stage_state_bytes[stage] / GIB
    activations = plan.stage_activation_bytes[stage] / GIB
    yield (
        f"a rank of pipeline stage {stage} holds {state:.1f} GiB of weights, gradients and"
        f" optimizer state and at least {activations:.1f} GiB of activations (forward passes in"
        f" flight: {passes}), together more than trainer.device_memory_gib = {memory:g}; use"
        f" {', or '.join(use)}"
    )


def _remedies(plan: Plan) -> list[str]:
    """Return full recompute and a smaller micro batch if each alone suffices, else both as one."""
    trainer = plan.config.trainer
    full = replace(
        trainer,
        recompute_granularity=Granularity.full,
        recompute_method=RecomputeMethod.uniform,
        recompute_num_layers=1,
        recompute_modules=None,
    )
    remedies = [FULL] if _fits(plan, full) else []
    if smaller := _largest_micro_batch(plan, trainer):
        remedies.append(f"trainer.micro_batch_size={smaller}")
    if not remedies and (smaller := _largest_micro_batch(plan, full)):
        remedies.append(f"{FULL} and trainer.micro_batch_size={smaller}")
    return remedies


def _largest_micro_batch(plan: Plan, trainer: TrainerConfig) -> int | None:
    """Return the largest smaller micro batch that fits and divides the present one, or None."""
    micro = trainer.micro_batch_size
    for size in range(micro - 1, 0, -1):
        if micro % size == 0 and _fits(plan, replace(trainer, micro_batch_size=size)):
            return size
    return None


def _fits(plan: Plan, trainer: TrainerConfig) -> bool:
    needed = derive(replace(plan.config, trainer=trainer)).least_bytes
    return needed <= trainer.device_memory_gib * GIB


RULES = [state_fits_the_device, activations_fit_the_device]
