"""The least that activations take on a rank: what surely waits for the backward pass, and nothing else. No torch.

Rule: a bound from below. What a kernel may keep or make anew is not counted; tests/config/test_activations.py compares
each layer's count with what autograd saves. Rows of experts are the mean over ranks: one that has fewer has less.
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

# of a number that a matrix product keeps
BYTES = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp8: 1}


def least_bytes(config: Config, layers: Stages, microbatches: int) -> tuple[int, ...]:
    """For a rank of each pipeline stage, at the end of a forward pass and at the begin of the backward pass.

    `microbatches` of a step and rank; `layers` of the chunks of each stage.
    """
    found = []
    for stage, row in enumerate(layers):
        waiting = sum(
            _waiting(config, row[chunk])
            for chunk in in_flight(len(layers), stage, len(row), microbatches)
        )
        # when the backward pass begins; the logits are gone by then
        at_once = [_made_anew(config, row[-1])]
        if stage == len(layers) - 1:
            at_once.append(_logits(config))
        found.append(waiting + max(at_once))
    return tuple(found)


def in_flight(stages: int, stage: int, chunks: int, microbatches: int) -> list[int]:
    """The chunk of every forward pass whose backward pass is yet to come, at the fullest moment of a stage's schedule.

    As Megatron-Core's schedules count: a warm-up, and the forward pass before the first backward pass.
    """
    if chunks == 1:
        return [0] * min(stages - stage, microbatches)
    warmup = 2 * (stages - stage - 1) + (chunks - 1) * stages
    passes = min(warmup + 1, microbatches * chunks)
    return [number % (stages * chunks) // stages for number in range(passes)]


def _waiting(config: Config, layers: int) -> int:
    """What the layers of a chunk keep of one microbatch until its backward pass."""
    trainer = config.trainer
    if trainer.fine_grained_activation_offloading:  # in the host's memory
        return 0
    each = trainer.recompute_num_layers or 1
    if trainer.recompute_granularity is not Granularity.full:
        return layers * layer_bytes(config)
    if trainer.recompute_method is RecomputeMethod.block:
        recomputed = min(each, layers)
        return recomputed * input_bytes(config) + (layers - recomputed) * layer_bytes(config)
    return -(-layers // each) * input_bytes(config)


def _made_anew(config: Config, layers: int) -> int:
    """What full recompute makes of a chunk's last unit of layers, beside the unit's input, while all else waits."""
    trainer = config.trainer
    each = config.trainer.recompute_num_layers or 1
    if trainer.recompute_granularity is not Granularity.full or not layers:
        return 0
    # layers after the recomputed ones have let go by then
    if trainer.recompute_method is RecomputeMethod.block:
        return layer_bytes(config) - input_bytes(config) if each >= layers else 0
    return min(each, layers) * layer_bytes(config) - input_bytes(config)


def input_bytes(config: Config) -> int:
    """A layer's input of one microbatch: its part of the sequence, whole rows."""
    return _rows(config)[0] * config.model.hidden_size * BYTES[config.trainer.precision]


def layer_bytes(config: Config) -> int:
    """What a layer keeps of one microbatch where it is not recomputed as a whole."""
    model = config.model
    tp = config.parallel.tensor_model_parallel_size
    own, whole = _rows(config)
    again = config.trainer.recompute_modules or []
    heads = (2 * model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels // tp
    numbers = 2 * own * model.hidden_size  # the inputs of both norms
    numbers += whole * heads  # queries, keys, values, and what attention makes of them
    if "layernorm" not in again:
        numbers += own * model.hidden_size  # what goes into the first matrix
    if "layernorm" not in again or "moe" in again:
        numbers += own * model.hidden_size  # and into the router
    if "moe" not in again:
        numbers += _experts(config)
    if "moe" not in again and "shared_experts" not in again:
        numbers += whole * 3 * (model.moe_shared_expert_intermediate_size or 0) // tp
    return numbers * BYTES[config.trainer.precision]


def _experts(config: Config) -> int:
    """Numbers that the experts of a rank keep: the rows sent to them, gate and up, and one tensor more."""
    model = config.model
    etp = config.parallel.expert_tensor_parallel_size
    ffn = model.moe_ffn_hidden_size // etp
    # layers/cpu/experts.py keeps the result of each row, everything else the product that goes into
    # the last matrix
    own = (
        config.trainer.accelerator is Accelerator.cpu
        and model.transformer_impl is TransformerImpl.torch
    )
    if own and model.moe_grouped_gemm:
        last = model.hidden_size
    else:
        last = 0 if "moe_act" in (config.trainer.recompute_modules or []) else ffn
    return _sent(config) * etp * (model.hidden_size + 2 * ffn + last)


def _sent(config: Config) -> int:
    """Rows that one rank's tokens are to the experts, each token once for each of its experts, at the least."""
    model = config.model
    dispatcher = config.dispatcher
    (own, _) = _rows(config)
    if dispatcher.moe_expert_capacity_factor is None:
        return own * model.moe_router_topk
    share = (
        own * model.moe_router_topk * dispatcher.moe_expert_capacity_factor / model.num_moe_experts
    )
    # rows of an expert that is full; at the least as many are as a token has
    full = min(own, int(share))
    return full * (
        model.num_moe_experts
        if dispatcher.moe_pad_expert_input_to_capacity
        else model.moe_router_topk
    )


def _logits(config: Config) -> int:
    """The scores of one microbatch on the last stage; our own loss keeps them as they are, others in fp32."""
    model = config.model
    tp = config.parallel.tensor_model_parallel_size
    own = model.transformer_impl is TransformerImpl.torch and tp == 1
    size = (
        BYTES[config.trainer.precision]
        if own or model.extra.get("cross_entropy_loss_fusion")
        else 4
    )
    return _rows(config)[1] * model.vocab_size // tp * size


def _rows(config: Config) -> tuple[int, int]:
    """Tokens of a microbatch on a rank: where the sequence is split over tensor ranks, and where it is not."""
    whole = (
        config.trainer.micro_batch_size
        * config.data.seq_length
        // config.parallel.context_parallel_size
    )
    return whole // config.parallel.tensor_model_parallel_size, whole
