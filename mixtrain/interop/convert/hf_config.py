"""A Config as the values of a Hugging Face config.json and back, and why a Config is no such model at all. No torch.

Rule: what decides the meaning of the weights has a row and is refused where the two cannot mean the same. What only
decides how they are trained (losses beside the LM loss, jitter, dropout, first weights) is not of interest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixtrain.config.families import FAMILIES, family_of
from mixtrain.config.families.family import ANY, COMMON_REQUIREMENTS, Family
from mixtrain.config.key_effects import show, value_of
from mixtrain.config.schema import Config
from mixtrain.errors import UserError
from mixtrain.interop.convert import rope_config

# The largest sizes that are looked into, far beyond every model: with larger ones names are made
# for minutes, and the shapes of tensors are beyond what a number holds.
MOST = {
    "num_hidden_layers": 2**14,
    "head_dim": 2**16,
    "num_attention_heads": 2**16,
    "hidden_size": 2**20,
}
MOST |= {
    "num_local_experts": 2**16,
    "num_experts": 2**16,
    "moe_intermediate_size": 2**24,
    "intermediate_size": 2**24,
}
MOST_OF_OTHERS = 2**31 - 1
MOST_NAMES = 2**18  # layers times experts, and layers times key/value heads


# Fields of TransformerConfig that change how something is computed and not what.
HARMLESS = (
    "attention_backend",
    "attention_softmax_in_fp32",
    "moe_permute_fusion",
    "moe_router_fusion",
)


def problems(config: Config) -> list[str]:
    """Why no model of transformers computes what the model of a Config does; none if one does."""
    family = family_of(config)
    found = [
        f"{row.key} = {show(value_of(config, row.key))}: {row.reason.format(family.name)};"
        f" use {'a number' if row.values == [ANY] else show(row.values[0])}"
        for row in family.unmet(config, [*COMMON_REQUIREMENTS, *family.features])
    ]
    return found + list(_router(config)) + list(_extra(config))


def _router(config: Config) -> Iterator[str]:
    """What the weights of the chosen experts are made of."""
    family = family_of(config)
    pre_softmax = config.router.moe_router_pre_softmax
    name = family.name
    whole = (
        f"its weights are softmax scores over all experts, {name}'s are divided by their sum"
        " over the chosen"
    )
    if "sinkhorn" in value_of(config, "router.moe_router_load_balancing_type"):
        yield f"router.moe_router_load_balancing_type = sinkhorn: {whole}; use another"
    elif pre_softmax and family.normalised:
        return  # config.json says so
    if config.model.moe_router_topk == 1:
        yield (
            "model.moe_router_topk = 1: Megatron-Core weighs a token's only expert by its score,"
            f" {name} always by 1; use 2 or more"
        )
    elif pre_softmax:
        yield f"router.moe_router_pre_softmax = true: {whole}; use false"


def _extra(config: Config) -> Iterator[str]:
    name = family_of(config).name
    for key, value in config.model.extra.items():
        if key not in HARMLESS:
            yield (
                f"model.extra.{key} = {show(value)}: it is not known that a {name} with it is"
                " still one; leave it out"
            )


def to_hugging_face(config: Config) -> dict[str, Any]:
    """The values of config.json for a resolved Config, in the words of the hub: transformers 4 and 5 read them.

    UserError with every reason why there are none.
    """
    if found := problems(config):
        raise UserError(*found)
    family = family_of(config)
    theta = float(config.model.rotary_base)
    normalised = (
        {family.normalised: not config.router.moe_router_pre_softmax}
        if family.normalised
        else {}
    )
    sizes = {theirs: value_of(config, ours) for theirs, ours in family.sizes}
    if wrong := _sizes(sizes, family):
        raise UserError(*[f"config.json: {problem}" for problem in wrong])
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **{name: spellings[0] for name, spellings in family.fixed.items()},
        "sliding_window": None,
        **({"use_sliding_window": False} if family.switched_window else {}),
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
    family = _of_model_type(values)
    wrong = [
        f"{other} = {show(values[other])}, but {name} = {show(values[name])}"
        for other, name in family.aliases.items()
        if other in values and name in values and values[other] != values[name]
    ]
    given = _by_its_names(values, family)
    values = {
        name: value for name, value in family.defaults.items() if name != "rope_theta"
    } | given
    for name, other in family.null_is.items():  # as transformers reads it
        if values[name] is None:
            values[name] = values[other]
    wrong += [
        f"{name} = {show(values[name])}: mixtrain's {family.name} has {show(spellings[0])}"
        for name, spellings in family.fixed.items()
        if name in values and not _among(values[name], spellings)
    ]
    wrong += [
        f"{name} = {show(values[name])} is not true or false"
        for name in ("tie_word_embeddings", family.normalised)
        if not isinstance(values.get(name, False), bool)
    ]
    if "auto_map" in values:
        wrong.append(
            "auto_map: the model wants code of its own, and none but transformers' is known or run"
        )
    wrong += _sizes(values, family)
    wrong += rope_config.window(values, family.name, switched=family.switched_window)
    theta, wrong_rope = rope_config.rope(
        values, family.name, family.defaults["rope_theta"]
    )
    if wrong + wrong_rope:
        raise UserError(*[f"config.json: {problem}" for problem in wrong + wrong_rope])
    found = {ours: values[theirs] for theirs, ours in family.sizes}
    if found["model.kv_channels"] is None:
        found["model.kv_channels"] = values["hidden_size"] // values["num_attention_heads"]
    normalised = family.normalised is None or values[family.normalised]
    return {"model.ffn_hidden_size": found["model.moe_ffn_hidden_size"]} | found | {
        "model.rotary_base": int(theta),
        "model.untie_embeddings_and_output_weights": not values["tie_word_embeddings"],
        **family.feature_values(),
        "router.moe_router_score_function": "softmax",
        "router.moe_router_pre_softmax": not normalised,
    }  # fmt: skip


def absent(values: Mapping[str, Any]) -> list[str]:
    """`key = value` of what from_hugging_face takes by transformers' default, as config.json has no such key."""
    family = _of_model_type(values)
    given = _by_its_names(values, family)
    silent = (
        "head_dim",
        "sliding_window",
        *(["rope_theta"] if rope_config.has_base(values) else []),
    )
    return [
        f"{name} = {show(value)}"
        for name, value in family.defaults.items()
        if name not in given and name not in silent
    ]


def beside_the_architecture(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config.json from_hugging_face has no use for, and to_hugging_face no value of its own."""
    family = _of_model_type(values)
    own = {
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        *family.defaults,
        *family.fixed,
    }
    own |= {
        *family.aliases,
        *rope_config.KEYS,
        "auto_map",
        "quantization_config",
        "compression_config",
    }
    return {name: value for name, value in values.items() if name not in own}


def _of_model_type(values: Mapping[str, Any]) -> Family:
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        known = " and ".join(FAMILIES)
        raise UserError(
            f"config.json: model_type = {show(values.get('model_type'))}: mixtrain converts {known}"
        )
    return family


def _by_its_names(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    return {family.aliases.get(name, name): value for name, value in values.items()}


def _among(value: Any, spellings: list[Any]) -> bool:
    """1 is not true and 0 not false."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in spellings
    )


def _sizes(values: Mapping[str, Any], family: Family) -> list[str]:
    """What is wrong with the numbers of a config.json, each alone and one against another."""
    wrong = []
    for theirs, _ in family.sizes:
        value = values[theirs]
        most = MOST.get(theirs, MOST_OF_OTHERS)
        if value is None and theirs == "head_dim":
            continue
        elif theirs == "rms_norm_eps":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                wrong.append(f"{theirs} = {show(value)} is not a number between 0 and 1")
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            wrong.append(f"{theirs} = {show(value)} is not a whole number from 1 to {most:,}")
    if wrong:
        return wrong
    (experts,) = (theirs for theirs, ours in family.sizes if ours == "model.num_moe_experts")
    if values["num_experts_per_tok"] > values[experts]:
        wrong.append(
            f"num_experts_per_tok = {values['num_experts_per_tok']}, but {experts} ="
            f" {values[experts]}"
        )
    wrong += [
        f"num_hidden_layers = {values['num_hidden_layers']} with {name} = {values[name]} is beyond"
        " every model"
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
