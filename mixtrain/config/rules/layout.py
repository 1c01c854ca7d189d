"""Rules about ranks: sizes that a layout must divide, and layouts that Megatron-Core supports.

No torch. The rule about expert parallelism and the number of experts is in experts.py.
"""

from __future__ import annotations

from mixtrain.config import pipeline_split
from mixtrain.config.choices import Accelerator
from mixtrain.config.laptop_layout import LAPTOP_RANKS, nearest_layout
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import (
    Problems,
    batch_sizes,
    dense_ranks_fit,
    must_divide,
    must_divide_each,
    near_multiples,
    ranks_fit,
    world_size_text,
)


def world_size_fits_dense_grid(plan: Plan) -> Problems:
    grid = plan.layout.dense_grid
    if plan.world_size % grid:
        yield (
            f"world size {world_size_text(plan)} must be a multiple of TP*PP*CP = {grid};"
            f" use {near_multiples(plan.world_size, grid)} ranks"
        )


def world_size_fits_expert_grid(plan: Plan) -> Problems:
    grid = plan.layout.expert_grid
    if plan.world_size % grid:
        yield (
            f"world size {world_size_text(plan)} must be a multiple of ETP*EP*PP = {grid};"
            f" use {near_multiples(plan.world_size, grid)} ranks"
        )


def heads_over_tensor_ranks(plan: Plan) -> Problems:
    tp = plan.config.parallel.tensor_model_parallel_size
    model = plan.config.model
    totals = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
    }
    yield from must_divide_each("parallel.tensor_model_parallel_size", tp, totals)


def vocabulary_over_tensor_ranks(plan: Plan) -> Problems:
    tp = plan.config.parallel.tensor_model_parallel_size
    vocab = plan.config.model.vocab_size
    if vocab % tp:
        yield (
            f"model.vocab_size = {vocab} must be a multiple of parallel.tensor_model_parallel_size"
            f" = {tp} (tools/convert_hf_to_megatron.py --make-vocab-size-divisible-by {tp} adds"
            " rows to a converted model); it is never padded silently: use"
            f" {near_multiples(vocab, tp)}"
        )


def layers_over_stages(plan: Plan) -> Problems:
    yield from pipeline_split.problems(plan.config.parallel, plan.config.model.num_layers)


def sequence_over_ranks(plan: Plan) -> Problems:
    length = plan.config.data.seq_length
    tp = plan.layout.tp
    cp = plan.layout.cp
    if length % tp:
        yield (
            f"data.seq_length = {length} must be a multiple of TP = {tp}; use"
            f" {near_multiples(length, tp)}"
        )
    unit = 2 * cp * tp
    if cp > 1 and length % unit:
        yield (
            f"data.seq_length = {length} must be a multiple of 2*CP*TP = {unit}; use"
            f" {near_multiples(length, unit)}"
        )


def expert_ffn_over_tensor_ranks(plan: Plan) -> Problems:
    etp = plan.config.parallel.expert_tensor_parallel_size
    model = plan.config.model
    ffn = model.moe_ffn_hidden_size
    yield from must_divide(
        "parallel.expert_tensor_parallel_size", etp, "model.moe_ffn_hidden_size", ffn
    )
    if shared := model.moe_shared_expert_intermediate_size:
        tp = plan.config.parallel.tensor_model_parallel_size
        name = "model.moe_shared_expert_intermediate_size"
        yield from must_divide("parallel.tensor_model_parallel_size", tp, name, shared)


def batch_over_ranks(plan: Plan) -> Problems:
    batch, micro, dp = batch_sizes(plan)
    if dense_ranks_fit(plan) and batch % (micro * dp):
        yield (
            f"trainer.global_batch_size = {batch} must be a multiple of trainer.micro_batch_size *"
            f" data parallel size = {micro}*{dp} = {micro * dp}; use"
            f" {near_multiples(batch, micro * dp)}"
        )


def tensor_parallel_experts_need_sequence_parallel(plan: Plan) -> Problems:
    parallel = plan.config.parallel
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size} with"
            " experts needs parallel.sequence_parallel = true (Megatron-Core refuses it in the"
            " first forward pass)"
        )


def sequence_parallel_needs_tensor_parallel(plan: Plan) -> Problems:
    parallel = plan.config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel = true does nothing at"
            " parallel.tensor_model_parallel_size = 1; use false"
        )


def virtual_pipeline_needs_pipeline(plan: Plan) -> Problems:
    parallel = plan.config.parallel
    vpp = parallel.virtual_pipeline_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    if not vpp:
        return
    if pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size = {vpp} needs"
            " parallel.pipeline_model_parallel_size of 2 or more, not 1; use null"
        )
    elif dense_ranks_fit(plan) and plan.num_microbatches % pp:
        batch, micro, dp = batch_sizes(plan)
        yield (
            f"virtual pipeline: {plan.num_microbatches} microbatches a step must be a multiple of"
            f" parallel.pipeline_model_parallel_size = {pp}; use trainer.global_batch_size ="
            f" {near_multiples(batch, micro * dp * pp)}"
        )


def optimizer_instances_divide(plan: Plan) -> Problems:
    parallel = plan.config.parallel
    key = "parallel.num_distributed_optimizer_instances"
    instances = parallel.num_distributed_optimizer_instances
    if instances == 1 or not ranks_fit(plan):
        return
    if not plan.config.optimizer.use_distributed_optimizer:
        yield f"{key} = {instances} needs optimizer.use_distributed_optimizer = true; it is false"
    edp = plan.layout.edp
    dense = plan.layout.dp * plan.layout.cp
    yield from must_divide_each(
        key, instances, {"expert data parallel size": edp, "data parallel size * CP": dense}
    )


def cpu_run_fits_a_laptop(plan: Plan) -> Problems:
    if plan.config.trainer.accelerator is Accelerator.cpu and plan.world_size > LAPTOP_RANKS:
        yield (
            f"this layout takes {plan.world_size} ranks; on the CPU mixtrain starts at most"
            f" {LAPTOP_RANKS}. The nearest layout: {nearest_layout(plan.config)}"
        )


RULES = [
    world_size_fits_dense_grid,
    world_size_fits_expert_grid,
    heads_over_tensor_ranks,
    vocabulary_over_tensor_ranks,
    layers_over_stages,
    sequence_over_ranks,
    expert_ffn_over_tensor_ranks,
    batch_over_ranks,
    tensor_parallel_experts_need_sequence_parallel,
    sequence_parallel_needs_tensor_parallel,
    virtual_pipeline_needs_pipeline,
    optimizer_instances_divide,
    cpu_run_fits_a_laptop,
]
