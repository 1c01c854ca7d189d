"""Every tensor of the model: key on disk, global shape, condition, initialization. No torch.

Rule: these are the tensors that Megatron-LM with Transformer Engine writes, layers stacked along
the first axis. Every implementation writes them, at every layout. Initialization, comparison and
conversion use no other names.

Legend: L layers, E experts, H hidden, V vocabulary, D head (kv_channels), Q query heads * D, K
key/value groups * D, F FFN size of an expert, S FFN size of the shared expert. Gate and up
projections are one tensor, gate first.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

from mixtrain.config.choices import QkLayernormOver
from mixtrain.config.schema import Config, ModelConfig

LAYER = "decoder.layers."
ATTENTION = LAYER + "self_attention."
EXPERTS = LAYER + "mlp.experts.experts."
SHARED = LAYER + "mlp.shared_experts."


class TensorRow(NamedTuple):
    """A tensor of the model."""

    key: str
    shape: str
    when: str
    init_kind: str
    split: str  # over tensor-parallel ranks (tp), expert-parallel ones (ep), or on every rank whole

    def whole(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The whole shape, with the letters' sizes."""
        return tuple(sizes[letter] for letter in self.shape.split())


# fmt: off
TENSORS = [TensorRow(*row) for row in [
    ("embedding.word_embeddings.weight",         "V H",      "always",          "normal", "tp"),
    (ATTENTION + "linear_qkv.layer_norm_weight", "L H",      "always",          "ones",   ""),
    (ATTENTION + "linear_qkv.weight",            "L Q+2K H", "always",          "normal", "tp"),
    (ATTENTION + "linear_qkv.bias",              "L Q+2K",   "qkv bias",        "zeros",  "tp"),
    (ATTENTION + "q_layernorm.weight",           "L D",      "head norm",       "ones",   ""),
    (ATTENTION + "k_layernorm.weight",           "L D",      "head norm",       "ones",   ""),
    (ATTENTION + "q_layernorm.weight",           "L Q",      "projection norm", "ones",   "tp"),
    (ATTENTION + "k_layernorm.weight",           "L K",      "projection norm", "ones",   "tp"),
    (ATTENTION + "linear_proj.weight",           "L H Q",    "always",          "scaled", "tp"),
    (LAYER + "pre_mlp_layernorm.weight",         "L H",      "always",          "ones",   ""),
    (LAYER + "mlp.router.weight",                "L E H",    "always",          "normal", ""),
    (LAYER + "mlp.router.expert_bias",           "L E",      "bias",            "buffer", ""),
    (EXPERTS + "linear_fc1.weight",              "L E 2F H", "always",          "normal", "ep"),
    (EXPERTS + "linear_fc2.weight",              "L E H F",  "always",          "scaled", "ep"),
    (SHARED + "gate_weight",                     "L 1 H",    "shared gate",     "normal", ""),
    (SHARED + "linear_fc1.weight",               "L 2S H",   "shared",          "normal", "tp"),
    (SHARED + "linear_fc2.weight",               "L H S",    "shared",          "scaled", "tp"),
    ("decoder.final_layernorm.weight",           "H",        "always",          "ones",   ""),
    ("output_layer.weight",                      "V H",      "untied",          "normal", "tp"),
]]
# fmt: on
# modules with a weight that are not Transformer Engine's
NOT_TRANSFORMER_ENGINES = ("embedding.word_embeddings", LAYER + "mlp.router", "output_layer")
CONDITIONS = {
    "always": lambda config: True,
    "qkv bias": lambda config: config.model.add_qkv_bias,
    "head norm": lambda config: _norm_over(config, QkLayernormOver.head),
    "projection norm": lambda config: _norm_over(config, QkLayernormOver.projection),
    "shared gate": lambda config: config.model.moe_shared_expert_gate,
    "bias": lambda config: config.router.moe_router_enable_expert_bias,
    "shared": lambda config: config.model.moe_shared_expert_intermediate_size is not None,
    "untied": lambda config: config.model.untie_embeddings_and_output_weights,
}


def _norm_over(config: Config, over: QkLayernormOver) -> bool:
    return config.model.qk_layernorm and config.model.qk_layernorm_over is over


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Key -> whole shape of every tensor that a resolved Config's model has on disk."""
    sizes = _sizes(config.model)
    return {row.key: row.whole(sizes) for row in TENSORS if CONDITIONS[row.when](config)}


def layer_counts(model: ModelConfig, split: str, part: str = "", axes: int = 1) -> int:
    """Parameters of one layer (of one expert, where `split` is ep) in tensors split that way.

    Counts only tensors whose key contains `part` and that have `axes` axes or more, stacking apart.
    """
    sizes = _sizes(model)
    config = SimpleNamespace(model=model)
    return sum(
        math.prod(shape)
        for row in TENSORS
        if row.key.startswith(LAYER) and row.init_kind != "buffer" and row.split == split
        if part in row.key and CONDITIONS[row.when](config)
        if len(shape := row.whole(sizes)[stacked_axes(row.key) :]) >= axes
    )


def _sizes(model: ModelConfig) -> dict[str, int]:
    query = model.num_attention_heads * model.kv_channels
    group = model.num_query_groups * model.kv_channels
    return {
        "L": model.num_layers,
        "E": model.num_moe_experts,
        "H": model.hidden_size,
        "V": model.vocab_size,
        "D": model.kv_channels,
        "1": 1,
        "Q": query,
        "K": group,
        "Q+2K": query + 2 * group,
        "F": model.moe_ffn_hidden_size,
        "2F": 2 * model.moe_ffn_hidden_size,
        "S": model.moe_shared_expert_intermediate_size,
        "2S": 2 * (model.moe_shared_expert_intermediate_size or 0),
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
