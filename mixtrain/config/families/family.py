"""What a model family is, and what most families share. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mixtrain.config import tensor_schema
from mixtrain.config.key_effects import value_of
from mixtrain.config.schema import Config


class HfTensors(NamedTuple):
    """The Megatron tensor `key` (config/tensor_schema.py) and the Hugging Face tensors it is made of.

    `split` is a key of SPLITS in interop/convert/tensor_mapping.py. A {layer} or {expert} in `names`
    is a leading axis of the Megatron tensor, in this order.
    """

    key: str
    split: str
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
        sizes: keys of config.json with the key of ours that has the same value.
        defaults: what transformers takes for a key that config.json does not have.
        features: requirements that decide which tensors the model has; they tell families apart.
        tensors: Hugging Face's tensors in files ("hub"), by Megatron key.
        fixed: values that config.json must have where it has the key: spellings of one value.
        aliases: other names of keys of config.json.
        normalised: the key that says whether a token's weights are divided by their sum, or None.
        null_is: a key of config.json that may be null, and the key whose value it then has.
        switched_window: sliding_window counts only where use_sliding_window is true.
        jitter: config.json has router_jitter_noise.
        published: name on Hugging Face -> (option of conf/model, the keys in which it differs).
    """

    name: str
    model_type: str
    class_name: str
    sizes: list[tuple[str, str]]
    defaults: dict[str, Any]
    features: list[Requirement]
    tensors: list[HfTensors]
    fixed: dict[str, list[Any]] = field(default_factory=lambda: dict(ACTIVATION))
    aliases: dict[str, str] = field(default_factory=dict)
    normalised: str | None = None
    null_is: dict[str, str] = field(default_factory=dict)
    switched_window: bool = False
    jitter: bool = False
    published: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def unmet(self, config: Config, requirements: list[Requirement]) -> list[Requirement]:
        return [row for row in requirements if not row.allows(value_of(config, row.key))]

    def feature_values(self) -> dict[str, Any]:
        """Key of ours -> value, of the features that allow one value."""
        return {row.key: row.values[0] for row in self.features if row.values != [ANY]}

    def rows(self, layout: str) -> dict[str, HfTensors]:
        """Megatron key -> row, in a layout: `hub` (files) or `fused` (transformers 5 in memory)."""
        rows = {row.key: row for row in [*COMMON_TENSORS, *self.tensors]}
        return rows | ({row.key: row for row in FUSED_TENSORS} if layout == "fused" else {})


LAYOUTS = ("hub", "fused")
ACTIVATION = {"hidden_act": ["silu", "swish"]}
SIZES = [
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
NO_SHARED_EXPERT = Requirement(
    "model.moe_shared_expert_intermediate_size", [None], "{} has no expert that sees every token"
)

# What no family here expresses.
COMMON_REQUIREMENTS = [
    Requirement("router.moe_router_score_function", ["softmax"], "{}'s weights of experts are a softmax"),
    Requirement(
        "router.moe_router_enable_expert_bias",
        [False],
        "{} chooses by the scores alone and has no tensor for a bias",
    ),
    Requirement(
        "router.moe_router_topk_scaling_factor",
        [None, 1.0],
        "{} does not scale the weights of a token's experts",
    ),
    Requirement("router.moe_router_num_groups", [None], "{} chooses among all experts"),
    Requirement("dispatcher.moe_expert_capacity_factor", [None], "{} drops no tokens"),
]

MEGATRON = tensor_schema.LAYER
LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
ROUTER = MEGATRON + "mlp.router.weight"
GATE_UP = MEGATRON + "mlp.experts.experts.linear_fc1.weight"
DOWN = MEGATRON + "mlp.experts.experts.linear_fc2.weight"
QKV = " ".join(f"{ATTENTION}{part}_proj.weight" for part in "qkv")

# The same in every family.
COMMON_TENSORS = [
    HfTensors("embedding.word_embeddings.weight", "rows", "model.embed_tokens.weight"),
    HfTensors(
        MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
        "whole",
        LAYER + "input_layernorm.weight",
    ),
    HfTensors(MEGATRON + "self_attention.linear_qkv.weight", "qkv", QKV),
    HfTensors(MEGATRON + "self_attention.linear_proj.weight", "whole", ATTENTION + "o_proj.weight"),
    HfTensors(
        MEGATRON + "pre_mlp_layernorm.weight", "whole", LAYER + "post_attention_layernorm.weight"
    ),
    HfTensors("decoder.final_layernorm.weight", "whole", "model.norm.weight"),
    HfTensors("output_layer.weight", "rows", "lm_head.weight"),
]
# The names that differ in transformers 5's memory, and in files saved with save_original_format=False.
FUSED_TENSORS = [
    HfTensors(ROUTER, "whole", LAYER + "mlp.gate.weight"),
    HfTensors(GATE_UP, "whole", LAYER + "mlp.experts.gate_up_proj"),
    HfTensors(DOWN, "whole", LAYER + "mlp.experts.down_proj"),
]
# The router and the experts in the files of Qwen's and OLMo's Mixture-of-Experts models.
EXPERT = LAYER + "mlp.experts.{expert}."
MLP_EXPERTS = [
    HfTensors(ROUTER, "whole", LAYER + "mlp.gate.weight"),
    HfTensors(GATE_UP, "gate_up", f"{EXPERT}gate_proj.weight {EXPERT}up_proj.weight"),
    HfTensors(DOWN, "whole", EXPERT + "down_proj.weight"),
]
HEAD_NORMS = [
    HfTensors(MEGATRON + "self_attention.q_layernorm.weight", "whole", ATTENTION + "q_norm.weight"),
    HfTensors(MEGATRON + "self_attention.k_layernorm.weight", "whole", ATTENTION + "k_norm.weight"),
]
