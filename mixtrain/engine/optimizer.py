"""From a Plan and model chunks to gradient reduction, Megatron-Core's optimizer and its schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
from mixtrain.config.schema import plain


@dataclass(frozen=True)
class Training:
    """Everything that a step changes: model chunks, optimizer and schedule."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def build(plan: Plan, models: list[torch.nn.Module]) -> Training:
    """Wrap the model chunks for data parallelism and give them their optimizer and schedule."""
    config = models[0].config
    chunks = reduced(plan, models)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **same_names(plan, OptimizerConfig),
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        ),
        chunks,
    )
    # Megatron-FSDP's: it would look at the norm only if it clips
    if not isinstance(optimizer, ChainedOptimizer):
        optimizer = ChainedOptimizer([optimizer])
    fuse(optimizer)
    config.grad_scale_func = optimizer.scale_loss
    return Training(chunks, optimizer, build_scheduler(plan.config.optimizer, optimizer))


def reduced(plan: Plan, models: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """The model chunks with gradient buffers that are reduced over data-parallel ranks after a backward pass."""
    config = models[0].config
    ddp = ddp_config(plan)
    wrapper = FullyShardedDataParallel if ddp.use_megatron_fsdp else DistributedDataParallel
    chunks = [
        wrapper(config, ddp, model, disable_bucketing=i > 0) for i, model in enumerate(models)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return chunks


def fuse(optimizer: ChainedOptimizer) -> None:
    """PyTorch's Adam in one pass over memory; by itself it takes ten on a CPU, and several kernels on a GPU."""
    for one in optimizer.chained_optimizers:
        # AdamW is one; Transformer Engine's and Apex's are fused
        if isinstance(one.optimizer, torch.optim.Adam):
            for group in one.optimizer.param_groups:
                group["fused"] = True


def ddp_config(plan: Plan) -> DistributedDataParallelConfig:
    """How gradients are reduced, and what is sharded over data-parallel ranks."""
    sharding = plan.config.parallel.data_parallel_sharding_strategy
    hybrid = sharding and plan.config.parallel.num_distributed_optimizer_instances > 1
    return DistributedDataParallelConfig(
        **same_names(plan, DistributedDataParallelConfig),
        use_megatron_fsdp=sharding is not None,
        outer_dp_sharding_strategy="optim" if hybrid else "no_shard",
        check_for_nan_in_grad=False,  # the loop checks the loss and the norm, and tells which rank
    )


def build_scheduler(settings: Settings, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Megatron-Core's schedule, counted in steps."""
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
    """Within the block every parameter is whole on its rank, also those that an overlapped gather has left for later.

    As Megatron-LM does to validate and to save: the gather happens once, here, not module by module.
    """
    gather_parameters(plan, training)
    yield
    if plan.config.optimizer.overlap_param_gather:
        for chunk in training.chunks:
            chunk.enable_forward_pre_hook()


def gather_parameters(plan: Plan, training: Training) -> None:
    """After the last step: fetch the parameters that an overlapped gather has left to the next forward pass."""
    if plan.config.optimizer.overlap_param_gather:
        for chunk in training.chunks:
            chunk.disable_forward_pre_hook()


def same_names(plan: Plan, kind: type) -> dict[str, object]:
    """The values of the optimizer and parallel sections that `kind`, a dataclass of Megatron-Core, has fields for."""
    known = {field.name for field in fields(kind)}
    sections = {**vars(plan.config.optimizer), **vars(plan.config.parallel)}
    return {
        name: plain(value)
        for name, value in sections.items()
        if name in known and value is not None
    }
