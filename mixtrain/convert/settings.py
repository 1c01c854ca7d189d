"""A Config as the values of a Hugging Face config.json and back, and why a Config is no such model at all. No torch.

Rule: what decides the meaning of the weights has a row and is refused where the two cannot mean the same. What only
decides how they are trained (losses beside the LM loss, jitter, dropout, first weights) is not of interest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mixtrain.classes import show, value_of
from mixtrain.config import Config
from mixtrain.errors import UserError

REQUIRED = object()  # must be in config.json
# The largest sizes that are looked into, far beyond every model: with larger ones names are made for minutes, and the
# shapes of tensors are beyond what a number holds.
MOST = {"num_hidden_layers": 2**14, "head_dim": 2**16, "num_attention_heads": 2**16, "hidden_size": 2**20}
MOST |= {"num_local_experts": 2**16, "num_experts": 2**16, "moe_intermediate_size": 2**24, "intermediate_size": 2**24}
MOST_OF_OTHERS = 2**31 - 1
MOST_NAMES = 2**18  # layers times experts, and layers times key/value heads
MOST_THETA = 2**53  # whole numbers in a double


class Architecture(NamedTuple):
    """A model of transformers that mixtrain can be."""

    name: str  # as a sentence has it
    model_type: str
    class_name: str
    same: list[tuple[str, str, Any]]  # a key of config.json, ours, and what transformers takes where it is not there
    fixed: dict[str, Any]  # what every such model that mixtrain can be has, where config.json has it at all
    also: dict[str, str]  # other names of keys, old or new
    normalised: str | None  # the key that says whether a token's weights are divided by their sum; None: they are
    qk_layernorm: bool


# fmt: off
SAME = [
    ("num_hidden_layers",       "model.num_layers",              REQUIRED),
    ("hidden_size",             "model.hidden_size",             REQUIRED),
    ("num_attention_heads",     "model.num_attention_heads",     REQUIRED),
    ("num_key_value_heads",     "model.num_query_groups",        REQUIRED),
    ("head_dim",                "model.kv_channels",             None),  # hidden_size / num_attention_heads
    ("num_experts_per_tok",     "model.moe_router_topk",         REQUIRED),
    ("vocab_size",              "model.vocab_size",              REQUIRED),
    ("max_position_embeddings", "model.max_position_embeddings", REQUIRED),
    ("rms_norm_eps",            "model.layernorm_epsilon",       REQUIRED),
]
FIXED = {"hidden_act": "silu", "sliding_window": None}

MIXTRAL = Architecture(
    "Mixtral", "mixtral", "MixtralForCausalLM",
    [*SAME,
        ("num_local_experts",   "model.num_moe_experts",         REQUIRED),
        ("intermediate_size",   "model.moe_ffn_hidden_size",     REQUIRED)],
    FIXED, {}, None, False)
QWEN3_MOE = Architecture(
    "Qwen3-MoE", "qwen3_moe", "Qwen3MoeForCausalLM",
    [*SAME,
        ("num_experts",           "model.num_moe_experts",       REQUIRED),
        ("moe_intermediate_size", "model.moe_ffn_hidden_size",   REQUIRED),
        ("intermediate_size",     "model.ffn_hidden_size",       REQUIRED)],  # of a dense layer, which there is none of
    FIXED | {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
    {"num_local_experts": "num_experts"}, "norm_topk_prob", True)
ARCHITECTURES = {architecture.model_type: architecture for architecture in (MIXTRAL, QWEN3_MOE)}

# Key of ours, the values with which a model is one of them, and why it is not with another.
WANTED = [
    ("router.moe_router_score_function", ["softmax"],
        "{}'s weights of experts are a softmax"),
    ("router.moe_router_enable_expert_bias", [False],
        "{} chooses by the scores alone and has no tensor for a bias"),
    ("router.moe_router_topk_scaling_factor", [None, 1.0],
        "{} does not scale the weights of a token's experts"),
    ("router.moe_router_num_groups", [None],
        "{} chooses among all experts"),
    ("dispatcher.moe_expert_capacity_factor", [None],
        "{} drops no tokens"),
    ("model.moe_shared_expert_intermediate_size", [None],
        "{} has no expert that sees every token"),
]
# fmt: on
# Fields of TransformerConfig that change how something is computed and not what.
HARMLESS = ("attention_backend", "attention_softmax_in_fp32", "moe_permute_fusion", "moe_router_fusion")


def architecture_of(config: Config) -> Architecture:
    """Which of transformers' models a Config is, if any: one has norms of queries and keys, the other has none."""
    return QWEN3_MOE if config.model.qk_layernorm else MIXTRAL


def problems(config: Config) -> list[str]:
    """Why no model of transformers computes what the model of a Config does; none if one does."""
    name = architecture_of(config).name
    found = [
        f"{key} = {show(value_of(config, key))}: {why.format(name)}; use {show(values[0])}"
        for key, values, why in WANTED
        if value_of(config, key) not in values
    ]
    return found + list(_router(config)) + list(_extra(config))


def _router(config: Config) -> Iterator[str]:
    """What the weights of the chosen experts are made of."""
    architecture, pre_softmax = architecture_of(config), config.router.moe_router_pre_softmax
    name = architecture.name
    whole = f"its weights are softmax scores over all experts, {name}'s are divided by their sum over the chosen"
    if "sinkhorn" in value_of(config, "router.moe_router_load_balancing_type"):
        yield f"router.moe_router_load_balancing_type = sinkhorn: {whole}; use another"
    elif pre_softmax and architecture.normalised:
        return  # config.json says so
    if config.model.moe_router_topk == 1:
        yield (
            f"model.moe_router_topk = 1: Megatron-Core weighs a token's only expert by its score, {name} always by 1;"
            " use 2 or more"
        )
    elif pre_softmax:
        yield f"router.moe_router_pre_softmax = true: {whole}; use false"


def _extra(config: Config) -> Iterator[str]:
    name = architecture_of(config).name
    for key, value in config.model.extra.items():
        if key not in HARMLESS:
            yield f"model.extra.{key} = {show(value)}: it is not known that a {name} with it is still one; leave it out"


def to_hugging_face(config: Config) -> dict[str, Any]:
    """The values of config.json for a resolved Config, in the words of the hub: transformers 4 and 5 read them.

    UserError with every reason why there are none.
    """
    if found := problems(config):
        raise UserError(*found)
    architecture, theta = architecture_of(config), float(config.model.rotary_base)
    normalised = {architecture.normalised: not config.router.moe_router_pre_softmax} if architecture.normalised else {}
    sizes = {theirs: value_of(config, ours) for theirs, ours, _ in architecture.same}
    if wrong := _sizes(sizes, architecture):
        raise UserError(*[f"config.json: {problem}" for problem in wrong])
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **architecture.fixed,
        **sizes,
        **normalised,
        "rope_theta": theta,  # transformers 4
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},  # transformers 5
        "tie_word_embeddings": not config.model.untie_embeddings_and_output_weights,
    }


def from_hugging_face(values: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value of ours for the contents of a config.json, of transformers 4 or 5.

    UserError with every value that mixtrain has nothing for.
    """
    architecture = ARCHITECTURES.get(str(values.get("model_type")))
    if architecture is None:
        known = " and ".join(ARCHITECTURES)
        raise UserError(f"config.json: model_type = {show(values.get('model_type'))}: mixtrain converts {known}")
    wrong = [
        f"{other} = {show(values[other])}, but {name} = {show(values[name])}"
        for other, name in architecture.also.items()
        if other in values and name in values and values[other] != values[name]
    ]
    values = {architecture.also.get(name, name): value for name, value in values.items()}
    wrong += [
        f"{name} = {show(values[name])}: mixtrain's {architecture.name} has {show(value)}"
        for name, value in architecture.fixed.items()
        if name in values and values[name] != value
    ]
    wrong += [
        f"{name} = {show(values[name])} is not true or false"
        for name in ("tie_word_embeddings", architecture.normalised)
        if not isinstance(values.get(name, False), bool)
    ]
    if "auto_map" in values:
        wrong.append("auto_map: the model wants code of its own, and none but transformers' is known or run")
    wrong += _sizes(values, architecture)
    theta, wrong_rope = _rope(values, architecture.name)
    if wrong + wrong_rope:
        raise UserError(*[f"config.json: {problem}" for problem in wrong + wrong_rope])
    found = {ours: values.get(theirs, absent) for theirs, ours, absent in architecture.same}
    if found["model.kv_channels"] is None:
        found["model.kv_channels"] = values["hidden_size"] // values["num_attention_heads"]
    normalised = architecture.normalised is None or values.get(architecture.normalised, False)
    return {"model.ffn_hidden_size": found["model.moe_ffn_hidden_size"]} | found | {
        "model.rotary_base": int(theta),
        "model.untie_embeddings_and_output_weights": not values.get("tie_word_embeddings", False),
        "model.qk_layernorm": architecture.qk_layernorm,
        "model.moe_shared_expert_intermediate_size": None,
        "router.moe_router_score_function": "softmax",
        "router.moe_router_pre_softmax": not normalised,
    }  # fmt: skip


def _sizes(values: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """What is wrong with the numbers of a config.json, each alone and one against another."""
    wrong = []
    for theirs, _, absent in architecture.same:
        value, most = values.get(theirs, absent), MOST.get(theirs, MOST_OF_OTHERS)
        if value is REQUIRED:
            wrong.append(f"{theirs} is missing")
        elif value is None and absent is None:
            continue
        elif theirs == "rms_norm_eps":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                wrong.append(f"{theirs} = {show(value)} is not a number between 0 and 1")
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            wrong.append(f"{theirs} = {show(value)} is not a whole number from 1 to {most:,}")
    if wrong:
        return wrong
    (experts,) = (theirs for theirs, ours, _ in architecture.same if ours == "model.num_moe_experts")
    if values["num_experts_per_tok"] > values[experts]:
        wrong.append(f"num_experts_per_tok = {values['num_experts_per_tok']}, but {experts} = {values[experts]}")
    wrong += [
        f"num_hidden_layers = {values['num_hidden_layers']} with {name} = {values[name]} is beyond every model"
        for name in (experts, "num_key_value_heads")
        if values["num_hidden_layers"] * values[name] > MOST_NAMES
    ]
    divisions = [("num_key_value_heads", "num_attention_heads")]
    if values.get("head_dim") is None:
        divisions.append(("num_attention_heads", "hidden_size"))
    return wrong + [
        f"{part} = {values[part]} must divide {whole} = {values[whole]}"
        for part, whole in divisions
        if values[whole] % values[part]
    ]


def _rope(values: Mapping[str, Any], name: str) -> tuple[float, list[str]]:
    """The base of the rotary embedding, and what stands against it: transformers 5's key, or transformers 4's two."""
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        return 0.0, [f"rope_parameters = {rope} is not a mapping"]
    rope = dict(rope)
    theta = rope.pop("rope_theta", values.get("rope_theta"))
    kind = rope.pop("rope_type", "default")
    wrong = []
    if theta is None:
        return 0.0, ["rope_theta is missing, in rope_parameters and beside it"]
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta <= MOST_THETA:
        return 0.0, [f"rope_theta = {theta} is not a number above 0, up to {MOST_THETA:,}"]
    if values.get("rope_theta", theta) != theta:
        wrong.append(f"rope_theta = {values['rope_theta']}, but rope_parameters.rope_theta = {theta}")
    if theta != int(theta):
        wrong.append(f"rope_theta = {theta}: model.rotary_base is a whole number")
    if kind != "default":
        wrong.append(f"rope_parameters.rope_type = {kind}: mixtrain's {name} has default")
    wrong += [f"rope_parameters.{key} = {rope[key]}: mixtrain's {name} has none" for key in rope]
    if values.get("rope_scaling") is not None:
        wrong.append(f"rope_scaling = {values['rope_scaling']}: mixtrain's {name} has null")
    return theta, wrong
