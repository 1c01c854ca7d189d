"""Rules about the memory of a device: the state of a rank, and what its activations take at the least. No torch."""

from __future__ import annotations

from collections.abc import Iterator
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
            " to try all the same"
        )


def activations_fit_the_device(plan: Plan) -> Problems:
    """Beside a state that fits, of a layout that does: else all this follows from what is said already."""
    memory = plan.config.trainer.device_memory_gib
    parallel = plan.config.parallel
    if memory is None or plan.state_bytes > memory * GIB or plan.least_bytes <= memory * GIB:
        return
    if not ranks_fit(plan) or pipeline_split.problems(parallel, plan.config.model.num_layers):
        return
    stage = plan.fullest_stage
    passes = len(in_flight(len(plan.layers), stage, len(plan.layers[stage]), plan.num_microbatches))
    use = [*_that_fit(plan), "more TP or CP", "trainer.device_memory_gib=null to try all the same"]
    state = plan.stage_state_bytes[stage] / GIB
    kept = plan.stage_activation_bytes[stage] / GIB
    yield (
        f"a rank of pipeline stage {stage} holds {state:.1f} GiB of weights, gradients and"
        f" optimizer state and at least {kept:.1f} GiB of activations (forward passes in flight:"
        f" {passes}), together more than trainer.device_memory_gib = {memory:g}; use"
        f" {', or '.join(use)}"
    )


def _that_fit(plan: Plan) -> Iterator[str]:
    """What alone brings the bound below the device's memory; where neither does, both."""
    trainer = plan.config.trainer
    full = replace(
        trainer,
        recompute_granularity=Granularity.full,
        recompute_method=RecomputeMethod.uniform,
        recompute_num_layers=1,
        recompute_modules=None,
    )
    found = [FULL] * _fits(plan, full)
    if smaller := _largest_that_fits(plan, trainer):
        found.append(f"trainer.micro_batch_size={smaller}")
    if not found and (smaller := _largest_that_fits(plan, full)):
        found.append(f"{FULL} and trainer.micro_batch_size={smaller}")
    yield from found


def _largest_that_fits(plan: Plan, trainer: TrainerConfig) -> int | None:
    """The largest smaller micro batch, of those that divide it: the batch can be made of them too."""
    micro = trainer.micro_batch_size
    sizes = (size for size in range(micro - 1, 0, -1) if micro % size == 0)
    return next(
        (size for size in sizes if _fits(plan, replace(trainer, micro_batch_size=size))), None
    )


def _fits(plan: Plan, trainer: TrainerConfig) -> bool:
    return (
        derive(replace(plan.config, trainer=trainer)).least_bytes <= trainer.device_memory_gib * GIB
    )


RULES = [state_fits_the_device, activations_fit_the_device]
