"""The cross-field rules: what a Config must keep so that Megatron-Core trains what the user meant. No torch.

Rule: each rule is a function of the derived Plan that yields one sentence per breach, with the keys, both numbers and
the nearest legal value; RULES lists them all and every one has a test. Rules about this machine are in machine.py.
"""

from __future__ import annotations

import math
from typing import Iterator

from mixtrain.config import Accelerator, Balancing, DataKind, Granularity, Precision, ScoreFunction, TransformerImpl
from mixtrain.costs import GIB
from mixtrain.layouts import LAPTOP_RANKS, nearest_layout
from mixtrain.plan import Plan, dense_grid, expert_grid

Problems = Iterator[str]
SELECTIVE_MODULES = ("core_attn", "layernorm", "moe", "moe_act", "shared_experts")


def broken_rules(plan: Plan) -> list[str]:
    """Every problem of every rule, in the order of RULES."""
    return [problem for rule in RULES for problem in rule(plan)]


def near_divisors(size: int, of: int) -> str:
    """The divisors of `of` next to `size`, as in `4 or 8`."""
    divisors = [number for number in range(1, of + 1) if of % number == 0]
    below, above = [d for d in divisors if d < size][-1:], [d for d in divisors if d > size][:1]
    return " or ".join(str(number) for number in below + above)


def near_multiples(size: int, of: int) -> str:
    """The multiples of `of` next to `size`, as in `96 or 112`."""
    below = size // of * of
    return " or ".join(str(number) for number in (below, below + of) if number > 0)


def must_divide(key: str, size: int, name: str, total: int) -> Problems:
    if total % size:
        yield f"{key} = {size} must divide {name} = {total}; use {near_divisors(size, total)}"


def dense_ranks(plan: Plan) -> Problems:
    grid = dense_grid(plan.config)
    if plan.world_size % grid:
        yield (
            f"world size {_world(plan)} must be a multiple of TP*PP*CP = {grid};"
            f" use {near_multiples(plan.world_size, grid)} ranks"
        )


def expert_ranks(plan: Plan) -> Problems:
    grid = expert_grid(plan.config)
    if plan.world_size % grid:
        yield (
            f"world size {_world(plan)} must be a multiple of ETP*EP*PP = {grid};"
            f" use {near_multiples(plan.world_size, grid)} ranks"
        )


def experts_over_ranks(plan: Plan) -> Problems:
    size, experts = plan.config.parallel.expert_model_parallel_size, plan.config.model.num_moe_experts
    yield from must_divide("parallel.expert_model_parallel_size", size, "model.num_moe_experts", experts)


def topk_within_experts(plan: Plan) -> Problems:
    topk, experts = plan.config.model.moe_router_topk, plan.config.model.num_moe_experts
    if topk > experts:
        yield f"model.moe_router_topk = {topk} must be at most model.num_moe_experts = {experts}"


def heads_over_tensor_ranks(plan: Plan) -> Problems:
    tp, model = plan.config.parallel.tensor_model_parallel_size, plan.config.model
    key = "parallel.tensor_model_parallel_size"
    yield from must_divide(key, tp, "model.num_attention_heads", model.num_attention_heads)
    yield from must_divide(key, tp, "model.num_query_groups", model.num_query_groups)


def groups_of_heads(plan: Plan) -> Problems:
    model = plan.config.model
    groups, heads = model.num_query_groups, model.num_attention_heads
    yield from must_divide("model.num_query_groups", groups, "model.num_attention_heads", heads)


def vocabulary_over_tensor_ranks(plan: Plan) -> Problems:
    tp, vocab = plan.config.parallel.tensor_model_parallel_size, plan.config.model.vocab_size
    if vocab % tp:
        yield (
            f"model.vocab_size = {vocab} must be a multiple of parallel.tensor_model_parallel_size = {tp};"
            f" it is never padded silently: use {near_multiples(vocab, tp)}"
        )


def layers_over_stages(plan: Plan) -> Problems:
    parallel, layers = plan.config.parallel, plan.config.model.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if layers % (pp * vpp):
        yield f"model.num_layers = {layers} must be a multiple of PP*VPP = {pp}*{vpp}; use {near_multiples(layers, pp * vpp)}"


def sequence_over_ranks(plan: Plan) -> Problems:
    parallel, length = plan.config.parallel, plan.config.data.seq_length
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if length % tp:
        yield f"data.seq_length = {length} must be a multiple of TP = {tp}; use {near_multiples(length, tp)}"
    if cp > 1 and length % (2 * cp * tp):
        part = 2 * cp * tp
        yield f"data.seq_length = {length} must be a multiple of 2*CP*TP = {part}; use {near_multiples(length, part)}"


def sequence_within_positions(plan: Plan) -> Problems:
    length, positions = plan.config.data.seq_length, plan.config.model.max_position_embeddings
    if length > positions:
        yield f"data.seq_length = {length} must be at most model.max_position_embeddings = {positions}"


def expert_ffn_over_tensor_ranks(plan: Plan) -> Problems:
    etp, model = plan.config.parallel.expert_tensor_parallel_size, plan.config.model
    ffn = model.moe_ffn_hidden_size
    yield from must_divide("parallel.expert_tensor_parallel_size", etp, "model.moe_ffn_hidden_size", ffn)
    if shared := model.moe_shared_expert_intermediate_size:
        tp = plan.config.parallel.tensor_model_parallel_size
        name = "model.moe_shared_expert_intermediate_size"
        yield from must_divide("parallel.tensor_model_parallel_size", tp, name, shared)


def batch_over_ranks(plan: Plan) -> Problems:
    batch, micro, dp = _batch(plan)
    if plan.world_size % dense_grid(plan.config) == 0 and batch % (micro * dp):
        yield (
            f"trainer.global_batch_size = {batch} must be a multiple of trainer.micro_batch_size * data parallel size"
            f" = {micro}*{dp} = {micro * dp}; use {near_multiples(batch, micro * dp)}"
        )


def balancing_has_its_coefficient(plan: Plan) -> Problems:
    router = plan.config.router
    kind, coefficient = router.moe_router_load_balancing_type, router.moe_aux_loss_coeff
    if kind in (Balancing.sinkhorn, Balancing.none) and coefficient != 0:
        yield (
            f"router.moe_router_load_balancing_type = {kind.name} has no auxiliary loss, but"
            f" router.moe_aux_loss_coeff = {coefficient}; use router.moe_aux_loss_coeff=0"
        )


def sinkhorn_drops_nothing(plan: Plan) -> Problems:
    capacity = plan.config.dispatcher.moe_expert_capacity_factor
    if plan.config.router.moe_router_load_balancing_type is Balancing.sinkhorn and capacity is not None:
        yield (
            "router.moe_router_load_balancing_type = sinkhorn takes no dispatcher.moe_expert_capacity_factor"
            f" = {capacity}; use null"
        )


def expert_bias_has_sigmoid(plan: Plan) -> Problems:
    router = plan.config.router
    if router.moe_router_enable_expert_bias and router.moe_router_score_function is not ScoreFunction.sigmoid:
        yield (
            "router.moe_router_enable_expert_bias = true needs router.moe_router_score_function = sigmoid,"
            f" not {router.moe_router_score_function.name}"
        )


def padding_has_capacity(plan: Plan) -> Problems:
    dispatcher = plan.config.dispatcher
    if dispatcher.moe_pad_expert_input_to_capacity and dispatcher.moe_expert_capacity_factor is None:
        yield (
            "dispatcher.moe_pad_expert_input_to_capacity = true needs a dispatcher.moe_expert_capacity_factor;"
            " it is null"
        )


def tensor_parallel_experts_need_sequence_parallel(plan: Plan) -> Problems:
    parallel = plan.config.parallel
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size} with experts needs"
            " parallel.sequence_parallel = true (Megatron-Core refuses it in the first forward pass)"
        )


def sequence_parallel_needs_tensor_parallel(plan: Plan) -> Problems:
    parallel = plan.config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield "parallel.sequence_parallel = true does nothing at parallel.tensor_model_parallel_size = 1; use false"


def overlap_needs_its_parts(plan: Plan) -> Problems:
    optimizer = plan.config.optimizer
    if optimizer.overlap_param_gather:
        for key in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(optimizer, key):
                yield f"optimizer.overlap_param_gather = true needs optimizer.{key} = true; it is false"


def local_has_neither_tensor_nor_context_parallel(plan: Plan) -> Problems:
    if plan.config.model.transformer_impl is not TransformerImpl.local:
        return
    parallel = plan.config.parallel
    for key, what in (("tensor_model_parallel_size", "norm"), ("context_parallel_size", "attention")):
        if (size := getattr(parallel, key)) > 1:
            yield (
                f"parallel.{key} = {size}: the {what} of model.transformer_impl = local refuses it; use 1,"
                " or model.transformer_impl=transformer_engine"
            )


def local_has_no_grouped_gemm(plan: Plan) -> Problems:
    model = plan.config.model
    if model.transformer_impl is TransformerImpl.local and model.moe_grouped_gemm:
        yield (
            "model.moe_grouped_gemm = true needs model.transformer_impl = transformer_engine,"
            " not local; use model.moe_grouped_gemm=false"
        )


def virtual_pipeline_needs_pipeline(plan: Plan) -> Problems:
    parallel = plan.config.parallel
    vpp, pp = parallel.virtual_pipeline_model_parallel_size, parallel.pipeline_model_parallel_size
    if not vpp:
        return
    if pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size = {vpp} needs parallel.pipeline_model_parallel_size"
            " of 2 or more, not 1; use null"
        )
    elif plan.num_microbatches % pp:
        yield (
            f"virtual pipeline: {plan.num_microbatches} microbatches a step must be a multiple of"
            f" parallel.pipeline_model_parallel_size = {pp}; use trainer.global_batch_size ="
            f" {near_multiples(_batch(plan)[0], _batch(plan)[1] * _batch(plan)[2] * pp)}"
        )


def optimizer_instances_divide(plan: Plan) -> Problems:
    parallel, key = plan.config.parallel, "parallel.num_distributed_optimizer_instances"
    instances = parallel.num_distributed_optimizer_instances
    if instances == 1:
        return
    if not plan.config.optimizer.use_distributed_optimizer:
        yield f"{key} = {instances} needs optimizer.use_distributed_optimizer = true; it is false"
    edp, dense = plan.expert_data_parallel_size, plan.data_parallel_size * parallel.context_parallel_size
    yield from must_divide(key, instances, "expert data parallel size", edp)
    yield from must_divide(key, instances, "data parallel size * CP", dense)


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


def cpu_run_fits_a_laptop(plan: Plan) -> Problems:
    if plan.config.trainer.accelerator is Accelerator.cpu and plan.world_size > LAPTOP_RANKS:
        yield (
            f"this layout takes {plan.world_size} ranks; on the CPU mixtrain starts at most {LAPTOP_RANKS}."
            f" The nearest layout: {nearest_layout(plan.config)}"
        )


def state_fits_the_device(plan: Plan) -> Problems:
    memory = plan.config.trainer.device_memory_gib
    if memory is not None and plan.state_bytes > memory * GIB:
        yield (
            f"a rank of pipeline stage {plan.heaviest_stage} holds {plan.state_bytes / GIB:.1f} GiB of weights, gradients"
            f" and optimizer state, more than trainer.device_memory_gib = {memory:g}; use more nodes or a larger"
            " pipeline, or null to try all the same"
        )


def _world(plan: Plan) -> str:
    trainer = plan.config.trainer
    return f"trainer.devices * trainer.num_nodes = {trainer.devices}*{trainer.num_nodes} = {plan.world_size}"


def _batch(plan: Plan) -> tuple[int, int, int]:
    return plan.config.trainer.global_batch_size, plan.config.trainer.micro_batch_size, plan.data_parallel_size


RULES = [
    dense_ranks,
    expert_ranks,
    experts_over_ranks,
    topk_within_experts,
    heads_over_tensor_ranks,
    groups_of_heads,
    vocabulary_over_tensor_ranks,
    layers_over_stages,
    sequence_over_ranks,
    sequence_within_positions,
    expert_ffn_over_tensor_ranks,
    batch_over_ranks,
    balancing_has_its_coefficient,
    sinkhorn_drops_nothing,
    expert_bias_has_sigmoid,
    padding_has_capacity,
    tensor_parallel_experts_need_sequence_parallel,
    sequence_parallel_needs_tensor_parallel,
    overlap_needs_its_parts,
    local_has_neither_tensor_nor_context_parallel,
    local_has_no_grouped_gemm,
    virtual_pipeline_needs_pipeline,
    optimizer_instances_divide,
    full_recompute_is_complete,
    selective_recompute_names_modules,
    fp8_needs_transformer_engine,
    data_has_its_source,
    split_has_three_parts,
    warmup_ends_before_decay,
    cpu_run_fits_a_laptop,
    state_fits_the_device,
]
