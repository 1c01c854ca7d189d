"""A lower bound of a rank's activation memory: what the backward pass certainly needs. No torch.

Rule: activations that a kernel may recompute are not counted. tests/config/test_activations.py
compares a layer's count with what autograd saves. Rows of experts are the mean over the ranks; a
rank with fewer rows needs less.
"""

from __future__ import annotations

from mixtrain.config.choices import (
    Accelerator,
    Granularity,
    Precision,
    RecomputeMethod,
    TransformerImpl,
)
from mixtrain.config.pipeline_split import Stages
from mixtrain.config.schema import Config

# bytes of an element that a matrix product saves
BYTES = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp8: 1}


def least_bytes(config: Config, layers: Stages, microbatches: int) -> tuple[int, ...]:
    """Return the bytes on a rank of each pipeline stage when its first backward pass begins.

    layers: [stage][chunk]; microbatches: per step and rank.
    """
    bytes_of_stage = []
    for stage, chunks in enumerate(layers):
        passes = in_flight(len(layers), stage, len(chunks), microbatches)
        saved = sum(_saved(config, chunks[chunk]) for chunk in passes)
        # the larger of two peaks: the logits are freed before the first recompute
        temporary = _recomputed(config, chunks[-1])
        if stage == len(layers) - 1:
            temporary = max(temporary, _logits(config))
        bytes_of_stage.append(saved + temporary)
    return tuple(bytes_of_stage)


def in_flight(stages: int, stage: int, chunks: int, microbatches: int) -> list[int]:
    """Return the chunk of each forward pass in flight when a stage holds the most of them.

    As in Megatron-Core's schedules: the warm-up, and one forward pass before the first backward.
    """
    if chunks == 1:
        return [0] * min(stages - stage, microbatches)
    warmup = 2 * (stages - stage - 1) + (chunks - 1) * stages
    passes = min(warmup + 1, microbatches * chunks)
    return [number % (stages * chunks) // stages for number in range(passes)]


def _saved(config: Config, layers: int) -> int:
    """Return the bytes that a chunk saves of one microbatch until its backward pass."""
    trainer = config.trainer
    if trainer.fine_grained_activation_offloading:  # they are in host memory
        return 0
    unit = trainer.recompute_num_layers or 1
    if trainer.recompute_granularity is not Granularity.full:
        return layers * layer_bytes(config)
    if trainer.recompute_method is RecomputeMethod.block:
        recomputed = min(unit, layers)
        return recomputed * input_bytes(config) + (layers - recomputed) * layer_bytes(config)
    return -(-layers // unit) * input_bytes(config)


def _recomputed(config: Config, layers: int) -> int:
    """Return the bytes that full recompute creates for a chunk's last unit, without its input."""
    trainer = config.trainer
    unit = trainer.recompute_num_layers or 1
    if trainer.recompute_granularity is not Granularity.full or not layers:
        return 0
    # block: the layers after the recomputed ones have freed theirs by then
    if trainer.recompute_method is RecomputeMethod.block:
        return layer_bytes(config) - input_bytes(config) if unit >= layers else 0
    return min(unit, layers) * layer_bytes(config) - input_bytes(config)


def input_bytes(config: Config) -> int:
    """Return the bytes of a layer's input of one microbatch on a rank."""
    return _tokens(config)[0] * config.model.hidden_size * BYTES[config.trainer.precision]


def layer_bytes(config: Config) -> int:
    """Return the bytes that a layer saves of one microbatch without full recompute."""
    model = config.model
    tp = config.parallel.tensor_model_parallel_size
    split_tokens, all_tokens = _tokens(config)
    recomputed = config.trainer.recompute_modules or []
    heads = (2 * model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels // tp
    elements = 2 * split_tokens * model.hidden_size  # the inputs of both norms
    elements += all_tokens * heads  # queries, keys, values, and the output of attention
    if "layernorm" not in recomputed:
        elements += split_tokens * model.hidden_size  # the input of the first matrix
    if "layernorm" not in recomputed or "moe" in recomputed:
        elements += split_tokens * model.hidden_size  # the input of the router
    if "moe" not in recomputed:
        elements += _expert_elements(config)
    if "moe" not in recomputed and "shared_experts" not in recomputed:
        elements += all_tokens * 3 * (model.moe_shared_expert_intermediate_size or 0) // tp
    return elements * BYTES[config.trainer.precision]


def _expert_elements(config: Config) -> int:
    """Return the elements that a rank's experts save: input rows, gate and up, one more tensor."""
    model = config.model
    etp = config.parallel.expert_tensor_parallel_size
    ffn = model.moe_ffn_hidden_size // etp
    is_cpu = config.trainer.accelerator is Accelerator.cpu
    # engine/layers/cpu/experts.py saves the output rows, other layers the input of the last matrix
    if is_cpu and model.transformer_impl is TransformerImpl.torch and model.moe_grouped_gemm:
        last = model.hidden_size
    else:
        last = 0 if "moe_act" in (config.trainer.recompute_modules or []) else ffn
    return _dispatched_rows(config) * etp * (model.hidden_size + 2 * ffn + last)


def _dispatched_rows(config: Config) -> int:
    """Return the least number of rows that a rank sends to experts: a row per token and expert."""
    model = config.model
    dispatcher = config.dispatcher
    (tokens, _) = _tokens(config)
    topk = model.moe_router_topk
    factor = dispatcher.moe_expert_capacity_factor
    if factor is None:
        return tokens * topk
    capacity = min(tokens, int(tokens * topk * factor / model.num_moe_experts))
    # without padding at least topk experts are full
    padded = dispatcher.moe_pad_expert_input_to_capacity
    return capacity * (model.num_moe_experts if padded else topk)


def _logits(config: Config) -> int:
    """Return the bytes of a microbatch's logits; only our own and fused losses do not need fp32."""
    model = config.model
    tp = config.parallel.tensor_model_parallel_size
    own_loss = model.transformer_impl is TransformerImpl.torch and tp == 1
    keeps_precision = own_loss or model.extra.get("cross_entropy_loss_fusion")
    size = BYTES[config.trainer.precision] if keeps_precision else 4
    return _tokens(config)[1] * model.vocab_size // tp * size


def _tokens(config: Config) -> tuple[int, int]:
    """Return a rank's tokens of a microbatch: (in the sequence-parallel region, outside of it)."""
    tokens = config.trainer.micro_batch_size * config.data.seq_length
    tokens //= config.parallel.context_parallel_size
    return tokens // config.parallel.tensor_model_parallel_size, tokens
