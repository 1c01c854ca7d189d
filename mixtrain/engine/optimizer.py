"""Wrap model chunks for data parallelism; build Megatron-Core's optimizer and schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mixtrain.config.plan import Plan
from mixtrain.config.schema import OptimizerConfig as Settings
from mixtrain.config.typed_config import plain


@dataclass(frozen=True)
class Training:
    """Everything that a step changes: model chunks, optimizer and schedule."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


class NormCheckedOptimizer(ChainedOptimizer):
    """ChainedOptimizer that passes the gradient norm to `check_norm` before it clips.

    step() computes the norm once. If `check_norm` raises, neither gradients nor parameters have
    changed.
    """

    def __init__(
        self, optimizers: list[MegatronOptimizer], check_norm: Callable[[float], None] | None
    ):
        super().__init__(optimizers)
        self.check_norm = check_norm

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        norm = super().get_grad_norm()
        if self.check_norm is None:
            return norm
        norm = float(norm)
        self.check_norm(norm)
        return norm


def build(
    plan: Plan,
    models: list[torch.nn.Module],
    check_norm: Callable[[float], None] | None = None,
) -> Training:
    """Wrap the model chunks for data parallelism and build their optimizer and schedule.

    Changes the models' TransformerConfig: set_schedule_callbacks writes grad_scale_func,
    finalize_model_grads_func and no_sync_func to it. Each step calls `check_norm` with the gradient
    norm before it clips.
    """
    config = models[0].config
    chunks = wrap_for_data_parallel(plan, models)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **matching_fields(plan, OptimizerConfig),
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        ),
        chunks,
    )
    # with Megatron-FSDP upstream may return one optimizer, which computes the norm only if it clips
    is_chained = isinstance(optimizer, ChainedOptimizer)
    optimizers = optimizer.chained_optimizers if is_chained else [optimizer]
    optimizer = NormCheckedOptimizer(optimizers, check_norm)
    use_fused_adam(optimizer)
    set_schedule_callbacks(plan, chunks, optimizer)
    return Training(chunks, optimizer, build_scheduler(plan.config.optimizer, optimizer))


def wrap_for_data_parallel(
    plan: Plan, models: list[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Give the model chunks gradient buffers that are reduced over data-parallel ranks."""
    ddp = ddp_config(plan)
    wrapper = FullyShardedDataParallel if ddp.use_megatron_fsdp else DistributedDataParallel
    return [
        wrapper(models[0].config, ddp, model, disable_bucketing=i > 0)
        for i, model in enumerate(models)
    ]


def set_schedule_callbacks(
    plan: Plan, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer | None
) -> None:
    """Write the functions that Megatron-Core's schedules call to the chunks' TransformerConfig.

    Without an optimizer the loss is not scaled.
    """
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads  # after the last microbatch
    if ddp_config(plan).overlap_grad_reduce:
        # around all microbatches but the last: only that one starts the reduction
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if optimizer is not None:
        config.grad_scale_func = optimizer.scale_loss  # on the loss, before backward


def use_fused_adam(optimizer: ChainedOptimizer) -> None:
    """Have PyTorch's Adam use its fused kernel.

    One pass over memory; the default takes ten on a CPU and several kernels on a GPU.
    """
    for chained in optimizer.chained_optimizers:
        # includes AdamW; Transformer Engine's and Apex's Adam are always fused
        if isinstance(chained.optimizer, torch.optim.Adam):
            for group in chained.optimizer.param_groups:
                group["fused"] = True


def ddp_config(plan: Plan) -> DistributedDataParallelConfig:
    """Return how gradients are reduced and what is sharded over data-parallel ranks."""
    sharding = plan.config.parallel.data_parallel_sharding_strategy
    hybrid = sharding and plan.config.parallel.num_distributed_optimizer_instances > 1
    return DistributedDataParallelConfig(
        **matching_fields(plan, DistributedDataParallelConfig),
        use_megatron_fsdp=sharding is not None,
        outer_dp_sharding_strategy="optim" if hybrid else "no_shard",
        check_for_nan_in_grad=False,  # the loop checks the loss and the norm, and names the rank
    )


def build_scheduler(settings: Settings, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return Megatron-Core's schedule, counted in steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_steps,
        lr_decay_steps=settings.lr_decay_steps,
        lr_decay_style=settings.lr_decay_style.name,
        wsd_decay_steps=settings.lr_wsd_decay_steps,
        lr_wsd_decay_style=settings.lr_wsd_decay_style.name,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=settings.lr_decay_steps,
        wd_incr_style="constant",
    )


@contextlib.contextmanager
def parameters_gathered(plan: Plan, training: Training) -> Iterator[None]:
    """Within the block every rank holds its full parameters, also with overlap_param_gather.

    One gather before the block, as in Megatron-LM's validation and saving, instead of one per
    module.
    """
    gather_parameters(plan, training)
    yield
    if plan.config.optimizer.overlap_param_gather:
        for chunk in training.chunks:
            chunk.enable_forward_pre_hook()


def gather_parameters(plan: Plan, training: Training) -> None:
    """Gather the parameters that an overlapped gather has deferred to the next forward pass."""
    if plan.config.optimizer.overlap_param_gather:
        for chunk in training.chunks:
            chunk.disable_forward_pre_hook()


def matching_fields(plan: Plan, config_class: type) -> dict[str, object]:
    """Return the optimizer and parallel settings that are fields of Megatron-Core's dataclass."""
    known = {field.name for field in fields(config_class)}
    sections = {**vars(plan.config.optimizer), **vars(plan.config.parallel)}
    return {
        name: plain(value)
        for name, value in sections.items()
        if name in known and value is not None
    }
