"""What a model family is, and what most families share. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mixtrain.config import tensor_schema
from mixtrain.config.key_effects import value_of
from mixtrain.config.schema import Config


class TensorMapping(NamedTuple):
    """A Megatron tensor and the Hugging Face tensors that it is split into.

    `key` is a key of config/tensor_schema.py. `names` are separated by spaces; {layer} and {expert}
    in them are the leading axes of the Megatron tensor.
    """

    key: str
    split: str  # a key of SPLITS in interop/convert/tensor_mapping.py
    names: str


class Requirement(NamedTuple):
    """A key of ours, the values a family allows, and why it allows no others ({} is its name)."""

    key: str
    values: list[Any]
    reason: str

    def allows(self, value: Any) -> bool:
        return value in self.values or (self.values == [ANY] and value is not None)


ANY = object()  # any value but null


@dataclass(frozen=True)
class Family:
    """A model class of transformers that mixtrain can train, and convert both ways.

    Attributes:
        name: as a sentence has it.
        model_type, class_name: of config.json.
        keys: (key of config.json, key of Config) with the same value.
        defaults: transformers' values for keys missing from config.json.
        features: requirements that decide which tensors the model has; they tell families apart.
        tensors: Hugging Face's tensors in files ("hub"), by Megatron key.
        fixed: keys that config.json may have with these values only, all of the same meaning.
        aliases: other key, old or new -> the key above.
        norm_topk_key: whether the weights of a token's experts are divided by their sum;
            None: always.
        null_is: a key of config.json that may be null, and the key whose value it then has.
        has_window_switch: sliding_window counts only where use_sliding_window is true.
        heads_fill_hidden: num_attention_heads * head_dim is hidden_size.
        jitter: config.json has router_jitter_noise.
        published: name on Hugging Face -> (option of conf/model, the keys in which it differs).
    """

    name: str
    model_type: str
    class_name: str
    keys: list[tuple[str, str]]
    defaults: dict[str, Any]
    features: list[Requirement]
    tensors: list[TensorMapping]
    fixed: dict[str, list[Any]] = field(default_factory=lambda: dict(ACTIVATION))
    aliases: dict[str, str] = field(default_factory=dict)
    norm_topk_key: str | None = None
    null_is: dict[str, str] = field(default_factory=dict)
    has_window_switch: bool = False
    heads_fill_hidden: bool = False
    jitter: bool = False
    published: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def unmet(self, config: Config, requirements: list[Requirement]) -> list[Requirement]:
        return [row for row in requirements if not row.allows(value_of(config, row.key))]

    def feature_values(self) -> dict[str, Any]:
        """Key of ours -> value, of the features that allow one value."""
        return {row.key: row.values[0] for row in self.features if row.values != [ANY]}

    def tensor_mapping(self, layout: str) -> dict[str, TensorMapping]:
        """Megatron key -> row, in a layout: `hub` (files) or `fused` (transformers 5 in memory)."""
        rows = [*COMMON_TENSORS, *self.tensors, *(FUSED_TENSORS if layout == "fused" else [])]
        return {row.key: row for row in rows}


LAYOUTS = ("hub", "fused")
ACTIVATION = {"hidden_act": ["silu", "swish"]}
KEYS = [
    ("num_hidden_layers", "model.num_layers"),
    ("hidden_size", "model.hidden_size"),
    ("num_attention_heads", "model.num_attention_heads"),
    ("num_key_value_heads", "model.num_query_groups"),
    ("head_dim", "model.kv_channels"),  # null: hidden_size / num_attention_heads
    ("num_experts_per_tok", "model.moe_router_topk"),
    ("vocab_size", "model.vocab_size"),
    ("max_position_embeddings", "model.max_position_embeddings"),
    ("rms_norm_eps", "model.layernorm_epsilon"),
]

# Features that a family has or has not.
NO_QK_NORM = Requirement("model.qk_layernorm", [False], "{} has no norms of queries and keys")
QK_NORM = Requirement("model.qk_layernorm", [True], "{} has norms of queries and keys")
HEAD_NORM = Requirement("model.qk_layernorm_over", ["head"], "{} has norms of each head")
NO_QKV_BIAS = Requirement(
    "model.add_qkv_bias", [False], "{} has no bias of queries, keys and values"
)
NO_SHARED_GATE = Requirement(
    "model.moe_shared_expert_gate", [False], "{} has no gate of a shared expert"
)
NO_SHARED_EXPERT = Requirement(
    "model.moe_shared_expert_intermediate_size", [None], "{} has no shared expert"
)

# What no family here expresses.
COMMON_REQUIREMENTS = [
    Requirement(
        "router.moe_router_score_function",
        ["softmax"],
        "{} computes the weights of experts with a softmax",
    ),
    Requirement(
        "router.moe_router_enable_expert_bias",
        [False],
        "{} routes by the scores alone and has no tensor for a bias",
    ),
    Requirement(
        "router.moe_router_topk_scaling_factor",
        [None, 1.0],
        "{} does not scale the weights of a token's experts",
    ),
    Requirement(
        "router.moe_router_num_groups",
        [None],
        "{} has no expert groups: it routes among all experts",
    ),
    Requirement("dispatcher.moe_expert_capacity_factor", [None], "{} drops no tokens"),
]

MEGATRON = tensor_schema.LAYER
LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
ROUTER = MEGATRON + "mlp.router.weight"
FC1 = MEGATRON + "mlp.experts.experts.linear_fc1.weight"
FC2 = MEGATRON + "mlp.experts.experts.linear_fc2.weight"
QKV = " ".join(f"{ATTENTION}{part}_proj.weight" for part in "qkv")

# The same in every family.
COMMON_TENSORS = [
    TensorMapping("embedding.word_embeddings.weight", "vocab_rows", "model.embed_tokens.weight"),
    TensorMapping(
        MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
        "none",
        LAYER + "input_layernorm.weight",
    ),
    TensorMapping(MEGATRON + "self_attention.linear_qkv.weight", "qkv", QKV),
    TensorMapping(
        MEGATRON + "self_attention.linear_proj.weight", "none", ATTENTION + "o_proj.weight"
    ),
    TensorMapping(
        MEGATRON + "pre_mlp_layernorm.weight", "none", LAYER + "post_attention_layernorm.weight"
    ),
    TensorMapping("decoder.final_layernorm.weight", "none", "model.norm.weight"),
    TensorMapping("output_layer.weight", "vocab_rows", "lm_head.weight"),
]
# Replacements for the names that transformers 5 uses in memory, and in files that it saves with
# save_original_format=False.
FUSED_TENSORS = [
    TensorMapping(ROUTER, "none", LAYER + "mlp.gate.weight"),
    TensorMapping(FC1, "none", LAYER + "mlp.experts.gate_up_proj"),
    TensorMapping(FC2, "none", LAYER + "mlp.experts.down_proj"),
]
# The router and the experts in the files of Qwen's and OLMo's Mixture-of-Experts models.
EXPERT = LAYER + "mlp.experts.{expert}."
MLP_EXPERTS = [
    TensorMapping(ROUTER, "none", LAYER + "mlp.gate.weight"),
    TensorMapping(FC1, "gate_up", f"{EXPERT}gate_proj.weight {EXPERT}up_proj.weight"),
    TensorMapping(FC2, "none", EXPERT + "down_proj.weight"),
]
HEAD_NORMS = [
    TensorMapping(
        MEGATRON + "self_attention.q_layernorm.weight", "none", ATTENTION + "q_norm.weight"
    ),
    TensorMapping(
        MEGATRON + "self_attention.k_layernorm.weight", "none", ATTENTION + "k_norm.weight"
    ),
]
