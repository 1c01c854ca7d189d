"""A Config as the values of Hugging Face's MixtralConfig and back, and why a Config is not a Mixtral at all. No torch.

Rule: what decides the meaning of the weights has a row and is refused where the two cannot mean the same. What only
decides how they are trained (losses beside the LM loss, dropping, jitter, dropout, first weights) is not of interest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixtrain.classes import show, value_of
from mixtrain.config import Config
from mixtrain.errors import UserError

REQUIRED = object()  # must be in config.json

# fmt: off
# A key of Hugging Face's config.json, ours, and what transformers takes where the file does not have it.
SAME = [
    ("num_hidden_layers",       "model.num_layers",              REQUIRED),
    ("hidden_size",             "model.hidden_size",             REQUIRED),
    ("intermediate_size",       "model.moe_ffn_hidden_size",     REQUIRED),
    ("num_attention_heads",     "model.num_attention_heads",     REQUIRED),
    ("num_key_value_heads",     "model.num_query_groups",        REQUIRED),
    ("head_dim",                "model.kv_channels",             None),  # hidden_size / num_attention_heads
    ("num_local_experts",       "model.num_moe_experts",         REQUIRED),
    ("num_experts_per_tok",     "model.moe_router_topk",         REQUIRED),
    ("vocab_size",              "model.vocab_size",              REQUIRED),
    ("max_position_embeddings", "model.max_position_embeddings", REQUIRED),
    ("rms_norm_eps",            "model.layernorm_epsilon",       REQUIRED),
]
# What every Mixtral that mixtrain can be has in config.json.
FIXED = {"model_type": "mixtral", "hidden_act": "silu", "sliding_window": None}

# Key of ours, the values with which a model is a Mixtral, and why it is not with another.
MIXTRAL = [
    ("router.moe_router_score_function", ["softmax"],
        "Mixtral's weights of experts are a softmax"),
    ("router.moe_router_enable_expert_bias", [False],
        "Mixtral chooses by the scores alone and has no tensor for a bias"),
    ("router.moe_router_topk_scaling_factor", [None, 1.0],
        "Mixtral's weights of a token's experts add up to 1"),
    ("router.moe_router_num_groups", [None],
        "Mixtral chooses among all experts"),
    ("model.moe_shared_expert_intermediate_size", [None],
        "Mixtral has no expert that sees every token"),
    ("model.qk_layernorm", [False],
        "Mixtral has no norm of queries and keys"),
]
# fmt: on
# Fields of TransformerConfig that change how something is computed and not what.
HARMLESS = ("attention_backend", "attention_softmax_in_fp32", "moe_permute_fusion", "moe_router_fusion")


def problems(config: Config) -> list[str]:
    """Why no MixtralForCausalLM computes what the model of a Config does; none if one does."""
    found = [
        f"{key} = {show(value_of(config, key))}: {why}; use {show(values[0])}"
        for key, values, why in MIXTRAL
        if value_of(config, key) not in values
    ]
    return found + list(_router(config)) + list(_extra(config))


def _router(config: Config) -> Iterator[str]:
    """What the weights of the chosen experts are made of."""
    whole = "its weights are softmax scores over all experts, Mixtral's are divided by their sum over the chosen"
    if "sinkhorn" in value_of(config, "router.moe_router_load_balancing_type"):
        yield f"router.moe_router_load_balancing_type = sinkhorn: {whole}; use another"
    if config.model.moe_router_topk == 1:
        yield (
            "model.moe_router_topk = 1: Megatron-Core weighs a token's only expert by its score, Mixtral always by 1;"
            " use 2 or more"
        )
    elif config.router.moe_router_pre_softmax:
        yield f"router.moe_router_pre_softmax = true: {whole}; use false"


def _extra(config: Config) -> Iterator[str]:
    for name, value in config.model.extra.items():
        if name not in HARMLESS:
            yield (
                f"model.extra.{name} = {show(value)}: it is not known that a Mixtral with it is still one; leave it out"
            )


def to_hugging_face(config: Config) -> dict[str, Any]:
    """The values of MixtralConfig for a resolved Config, as config.json has them: transformers 4 and 5 read it.

    UserError with every reason why there are none.
    """
    if found := problems(config):
        raise UserError(*found)
    theta = float(config.model.rotary_base)
    return {
        "architectures": ["MixtralForCausalLM"],
        **FIXED,
        **{theirs: value_of(config, ours) for theirs, ours, _ in SAME},
        "rope_theta": theta,  # transformers 4
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},  # transformers 5
        "tie_word_embeddings": not config.model.untie_embeddings_and_output_weights,
    }


def from_hugging_face(values: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value of ours for the contents of a config.json, of transformers 4 or 5.

    UserError with every value that mixtrain has nothing for.
    """
    wrong = [
        f"{name} = {show(values[name])}: mixtrain's Mixtral has {show(value)}"
        for name, value in FIXED.items()
        if name in values and values[name] != value
    ]
    wrong += [f"{theirs} is missing" for theirs, _, absent in SAME if values.get(theirs, absent) is REQUIRED]
    theta, wrong_rope = _rope(values)
    if wrong + wrong_rope:
        raise UserError(*[f"config.json: {problem}" for problem in wrong + wrong_rope])
    found = {ours: values.get(theirs, absent) for theirs, ours, absent in SAME}
    if found["model.kv_channels"] is None:
        found["model.kv_channels"] = values["hidden_size"] // values["num_attention_heads"]
    return found | {
        "model.ffn_hidden_size": values["intermediate_size"],  # of a dense layer, which there is none of
        "model.rotary_base": int(theta),
        "model.untie_embeddings_and_output_weights": not values.get("tie_word_embeddings", False),
        "model.qk_layernorm": False,
        "model.moe_shared_expert_intermediate_size": None,
        "router.moe_router_score_function": "softmax",
        "router.moe_router_pre_softmax": False,
    }


def _rope(values: Mapping[str, Any]) -> tuple[float, list[str]]:
    """The base of the rotary embedding, and what stands against it: transformers 5's key, or transformers 4's two."""
    rope = dict(values.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", values.get("rope_theta"))
    kind = rope.pop("rope_type", "default")
    wrong = []
    if theta is None:
        return 0.0, ["rope_theta is missing, in rope_parameters and beside it"]
    if values.get("rope_theta", theta) != theta:
        wrong.append(f"rope_theta = {values['rope_theta']}, but rope_parameters.rope_theta = {theta}")
    if theta != int(theta):
        wrong.append(f"rope_theta = {theta}: model.rotary_base is a whole number")
    if kind != "default":
        wrong.append(f"rope_parameters.rope_type = {kind}: mixtrain's Mixtral has default")
    wrong += [f"rope_parameters.{name} = {rope[name]}: mixtrain's Mixtral has none" for name in rope]
    if values.get("rope_scaling") is not None:
        wrong.append(f"rope_scaling = {values['rope_scaling']}: mixtrain's Mixtral has null")
    return theta, wrong
