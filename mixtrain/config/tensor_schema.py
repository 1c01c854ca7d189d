"""Every tensor of the model: key on disk, global shape, condition, initialization. No torch.

Rule: these are the tensors that Megatron-LM with Transformer Engine writes, layers stacked along
the first axis. Every implementation writes them, at every layout. Initialization, comparison and
conversion use no other names.

Legend: L layers, E experts, H hidden, V vocabulary, D head (kv_channels), Q query heads * D, K
key/value groups * D, F FFN size of an expert, S FFN size of the shared expert. Gate and up
projections are one tensor, gate first.
"""

from __future__ import annotations

from typing import NamedTuple

from mixtrain.config.schema import Config

LAYER = "decoder.layers."


class TensorRow(NamedTuple):
    """A tensor of the model."""

    key: str
    shape: str  # letters of the legend
    when: str  # a key of CONDITIONS
    init_kind: str  # see mixtrain/engine/weight_init.py


# fmt: off
TENSORS = [TensorRow(*row) for row in [
    ("embedding.word_embeddings.weight",                         "V H",      "always", "normal"),
    (LAYER + "self_attention.linear_qkv.layer_norm_weight",      "L H",      "always", "ones"),
    (LAYER + "self_attention.linear_qkv.weight",                 "L Q+2K H", "always", "normal"),
    (LAYER + "self_attention.q_layernorm.weight",                "L D",      "qk",     "ones"),
    (LAYER + "self_attention.k_layernorm.weight",                "L D",      "qk",     "ones"),
    (LAYER + "self_attention.linear_proj.weight",                "L H Q",    "always", "scaled"),
    (LAYER + "pre_mlp_layernorm.weight",                         "L H",      "always", "ones"),
    (LAYER + "mlp.router.weight",                                "L E H",    "always", "normal"),
    (LAYER + "mlp.router.expert_bias",                           "L E",      "bias",   "buffer"),
    (LAYER + "mlp.experts.experts.linear_fc1.weight",            "L E 2F H", "always", "normal"),
    (LAYER + "mlp.experts.experts.linear_fc2.weight",            "L E H F",  "always", "scaled"),
    (LAYER + "mlp.shared_experts.linear_fc1.weight",             "L 2S H",   "shared", "normal"),
    (LAYER + "mlp.shared_experts.linear_fc2.weight",             "L H S",    "shared", "scaled"),
    ("decoder.final_layernorm.weight",                           "H",        "always", "ones"),
    ("output_layer.weight",                                      "V H",      "untied", "normal"),
]]
# fmt: on
# modules with a weight that are not Transformer Engine's
NOT_TRANSFORMER_ENGINES = ("embedding.word_embeddings", LAYER + "mlp.router", "output_layer")
CONDITIONS = {
    "always": lambda config: True,
    "qk": lambda config: config.model.qk_layernorm,
    "bias": lambda config: config.router.moe_router_enable_expert_bias,
    "shared": lambda config: config.model.moe_shared_expert_intermediate_size is not None,
    "untied": lambda config: config.model.untie_embeddings_and_output_weights,
}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return {key: global shape} of all tensors on disk, for a resolved Config."""
    model = config.model
    query = model.num_attention_heads * model.kv_channels
    group = model.num_query_groups * model.kv_channels
    sizes = {
        "L": model.num_layers,
        "E": model.num_moe_experts,
        "H": model.hidden_size,
        "V": model.vocab_size,
        "D": model.kv_channels,
        "Q": query,
        "Q+2K": query + 2 * group,
        "F": model.moe_ffn_hidden_size,
        "2F": 2 * model.moe_ffn_hidden_size,
        "S": model.moe_shared_expert_intermediate_size,
        "2S": 2 * (model.moe_shared_expert_intermediate_size or 0),
    }
    return {
        row.key: tuple(sizes[letter] for letter in row.shape.split())
        for row in TENSORS
        if CONDITIONS[row.when](config)
    }


def init_kind(key: str) -> str:
    """Return how a tensor is initialized: normal, scaled, ones, or buffer (by its module)."""
    for row in TENSORS:
        if row.key == key:
            return row.init_kind
    raise RuntimeError(f"no row of TENSORS in mixtrain/config/tensor_schema.py describes {key}")


def stacked_axes(key: str) -> int:
    """Return the number of leading axes that index modules: the layer, then the expert."""
    if key.startswith(LAYER + "mlp.experts."):
        return 2
    return 1 if key.startswith(LAYER) else 0


def condition(key: str) -> str | None:
    """Return the condition of a tensor, a key of CONDITIONS; None for an unknown tensor."""
    return next((row.when for row in TENSORS if row.key == key), None)


def extra_state(key: str) -> str | None:
    """Return the key of the fp8 scales that Transformer Engine writes with a weight, or None."""
    module, _, name = key.rpartition(".")
    if name != "weight" or module in NOT_TRANSFORMER_ENGINES:
        return None
    return f"{module}._extra_state"
