"""Rules about data, precision, recompute, the optimizer and the schedule. No torch."""

from __future__ import annotations

import math

from mixtrain.config import Accelerator, DataKind, Granularity, Precision, TransformerImpl
from mixtrain.plan import Plan
from mixtrain.rules.nearest import Problems, must_divide

SELECTIVE_MODULES = ("core_attn", "layernorm", "moe", "moe_act", "shared_experts")


def groups_of_heads(plan: Plan) -> Problems:
    model = plan.config.model
    groups, heads = model.num_query_groups, model.num_attention_heads
    yield from must_divide("model.num_query_groups", groups, "model.num_attention_heads", heads)


def sequence_within_positions(plan: Plan) -> Problems:
    length, positions = plan.config.data.seq_length, plan.config.model.max_position_embeddings
    if length > positions:
        yield f"data.seq_length = {length} must be at most model.max_position_embeddings = {positions}"


def overlap_needs_its_parts(plan: Plan) -> Problems:
    optimizer = plan.config.optimizer
    if optimizer.overlap_param_gather:
        for key in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(optimizer, key):
                yield f"optimizer.overlap_param_gather = true needs optimizer.{key} = true; it is false"


def full_recompute_is_complete(plan: Plan) -> Problems:
    trainer = plan.config.trainer
    full = trainer.recompute_granularity is Granularity.full
    for key in ("recompute_method", "recompute_num_layers"):
        value = getattr(trainer, key)
        if full and value is None:
            yield f"trainer.recompute_granularity = full needs trainer.{key}; it is null, uniform and 1 recompute all"
        if not full and value is not None:
            yield f"trainer.{key} is set, but only trainer.recompute_granularity = full uses it; use null"


def selective_recompute_names_modules(plan: Plan) -> Problems:
    trainer, selective = plan.config.trainer, plan.config.trainer.recompute_granularity is Granularity.selective
    modules = trainer.recompute_modules
    if bool(modules) != selective:
        yield (
            f"trainer.recompute_modules = {modules or 'null'} goes with trainer.recompute_granularity = selective, and"
            f" it with a list of {', '.join(SELECTIVE_MODULES)}"
        )
    for name in modules or []:
        if name not in SELECTIVE_MODULES:
            yield f"trainer.recompute_modules has {name}; the modules are {', '.join(SELECTIVE_MODULES)}"
    if "moe_act" in (modules or []) and not plan.config.model.moe_grouped_gemm:
        yield "trainer.recompute_modules has moe_act, which needs model.moe_grouped_gemm = true; it is false"


def fp8_needs_transformer_engine(plan: Plan) -> Problems:
    model, precision = plan.config.model, plan.config.trainer.precision
    if precision is Precision.fp8 and model.transformer_impl is not TransformerImpl.transformer_engine:
        yield (
            "trainer.precision = fp8 needs model.transformer_impl = transformer_engine,"
            f" not {model.transformer_impl.name}"
        )
    if precision is Precision.fp8 and plan.config.trainer.accelerator is Accelerator.cpu:
        yield "trainer.precision = fp8 needs trainer.accelerator = gpu, not cpu"


def data_has_its_source(plan: Plan) -> Problems:
    data = plan.config.data
    if data.kind is DataKind.indexed and not data.data_path:
        yield "data.kind = indexed needs data.data_path=[PREFIX]; it is empty"
    if data.kind is DataKind.indexed and not data.tokenizer:
        yield "data.kind = indexed needs data.tokenizer=DIRECTORY; it is null"
    if data.kind is not DataKind.indexed and data.data_path:
        yield f"data.data_path is set, but data.kind = {data.kind.name} reads no files; type data=indexed"


def split_has_three_parts(plan: Plan) -> Problems:
    split = plan.config.data.split
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < math.inf for part in parts) or parts[0] == 0:
        yield f'data.split = "{split}" must be three numbers, the first above 0, as in "90,5,5"'
    elif parts[1] == 0 and plan.config.trainer.limit_val_batches:
        yield f'data.split = "{split}" leaves nothing to validate on; use trainer.limit_val_batches=0 or a second part'


def warmup_ends_before_decay(plan: Plan) -> Problems:
    optimizer = plan.config.optimizer
    if optimizer.lr_warmup_steps >= optimizer.lr_decay_steps:
        yield (
            f"optimizer.lr_warmup_steps = {optimizer.lr_warmup_steps} must be below optimizer.lr_decay_steps"
            f" = {optimizer.lr_decay_steps}"
        )
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} must be at most optimizer.lr = {optimizer.lr}"


RULES = [
    groups_of_heads,
    sequence_within_positions,
    overlap_needs_its_parts,
    full_recompute_is_complete,
    selective_recompute_names_modules,
    fp8_needs_transformer_engine,
    data_has_its_source,
    split_has_three_parts,
    warmup_ends_before_decay,
]
