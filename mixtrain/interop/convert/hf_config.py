"""Translate a Config to the values of a Hugging Face config.json and back. No torch.

Rule: every value that decides what the weights mean has a row, and is refused where the two sides
cannot mean the same. Values that only affect training (losses beside the LM loss, jitter, dropout,
initialization) are ignored.
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

# Upper limits of sizes, far beyond any model: beyond them, listing the tensor names takes minutes
# and tensor shapes overflow.
MAX_SIZES = {
    "num_hidden_layers": 2**14,
    "head_dim": 2**16,
    "num_attention_heads": 2**16,
    "hidden_size": 2**20,
    "num_local_experts": 2**16,
    "num_experts": 2**16,
    "moe_intermediate_size": 2**24,
    "intermediate_size": 2**24,
}
MAX_OTHER_SIZE = 2**31 - 1
MAX_LAYER_PRODUCT = 2**18  # layers times experts, and layers times key/value heads


# Fields of TransformerConfig that change how something is computed, not what.
IMPLEMENTATION_FIELDS = (
    "attention_backend",
    "attention_softmax_in_fp32",
    "moe_permute_fusion",
    "moe_router_fusion",
)


def export_problems(config: Config) -> list[str]:
    """Return every reason why no transformers model computes the same as a Config's model."""
    family = family_of(config)
    problems = [
        f"{row.key} = {show(value_of(config, row.key))}: {row.reason.format(family.name)};"
        f" use {'a number' if row.values == [ANY] else show(row.values[0])}"
        for row in family.unmet(config, [*COMMON_REQUIREMENTS, *family.features])
    ]
    return problems + list(_router_problems(config)) + list(_extra_problems(config))


def _router_problems(config: Config) -> Iterator[str]:
    """Yield the problems with the weights of a token's experts."""
    family = family_of(config)
    pre_softmax = config.router.moe_router_pre_softmax
    name = family.name
    reason = (
        "the weights of experts are softmax scores over all experts;"
        f" {name} divides them by their sum over the chosen experts"
    )
    if "sinkhorn" in value_of(config, "router.moe_router_load_balancing_type"):
        yield f"router.moe_router_load_balancing_type = sinkhorn: {reason}; use another type"
    elif pre_softmax and family.norm_topk_key:
        return  # config.json has a key for it
    if config.model.moe_router_topk == 1:
        yield (
            "model.moe_router_topk = 1: Megatron-Core weights a token's only expert by its score,"
            f" {name} always by 1; use 2 or more"
        )
    elif pre_softmax:
        yield f"router.moe_router_pre_softmax = true: {reason}; use false"


def _extra_problems(config: Config) -> Iterator[str]:
    name = family_of(config).name
    for key, value in config.model.extra.items():
        if key not in IMPLEMENTATION_FIELDS:
            yield (
                f"model.extra.{key} = {show(value)}: the model may not be a {name} with this"
                " field; leave it out"
            )


def to_hugging_face(config: Config) -> dict[str, Any]:
    """Return the values of config.json for a resolved Config; transformers 4 and 5 read them.

    UserError with every reason why transformers has no such model.
    """
    if problems := export_problems(config):
        raise UserError(*problems)
    family = family_of(config)
    theta = float(config.model.rotary_base)
    sizes = {hf_key: value_of(config, key) for hf_key, key in family.keys}
    if problems := _size_problems(sizes, family):
        raise UserError(*[f"config.json: {problem}" for problem in problems])
    values = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **{key: spellings[0] for key, spellings in family.fixed.items()},
        "sliding_window": None,
        **({"use_sliding_window": False} if family.has_window_switch else {}),
        **sizes,
    }
    if family.norm_topk_key:
        values[family.norm_topk_key] = not config.router.moe_router_pre_softmax
    return values | {
        "rope_theta": theta,  # transformers 4
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},  # transformers 5
        "tie_word_embeddings": not config.model.untie_embeddings_and_output_weights,
    }


def from_hugging_face(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return key of Config -> value for a config.json of transformers 4 or 5.

    UserError with every value that mixtrain does not support.
    """
    family = _family_of_json(config_json)
    problems = [
        f"{alias} = {show(config_json[alias])}, but {key} = {show(config_json[key])}"
        for alias, key in family.aliases.items()
        if alias in config_json and key in config_json and config_json[alias] != config_json[key]
    ]
    # a default of rope_theta would contradict one in rope_parameters
    values = {key: value for key, value in family.defaults.items() if key != "rope_theta"}
    values |= _without_aliases(config_json, family)
    for key, other in family.null_is.items():  # as transformers does
        if values[key] is None:
            values[key] = values[other]
    problems += [
        f"{key} = {show(values[key])}: mixtrain's {family.name} has {show(spellings[0])}"
        for key, spellings in family.fixed.items()
        if key in values and not _is_one_of(values[key], spellings)
    ]
    problems += [
        f"{key} = {show(values[key])} is not true or false"
        for key in ("tie_word_embeddings", family.norm_topk_key)
        if not isinstance(values.get(key, False), bool)
    ]
    if "auto_map" in config_json:
        problems.append(
            "auto_map: the model needs its own code; mixtrain runs none and supports only models"
            " that transformers implements"
        )
    problems += _size_problems(values, family)
    problems += rope_config.window_problems(
        values, family.name, has_switch=family.has_window_switch
    )
    theta, rope_problems = rope_config.rope_base(
        values, family.name, default=family.defaults["rope_theta"]
    )
    problems += rope_problems
    if problems:
        raise UserError(*[f"config.json: {problem}" for problem in problems])
    overrides = {key: values[hf_key] for hf_key, key in family.keys}
    if overrides["model.kv_channels"] is None:
        overrides["model.kv_channels"] = values["hidden_size"] // values["num_attention_heads"]
    overrides.setdefault("model.ffn_hidden_size", overrides["model.moe_ffn_hidden_size"])
    normalized = family.norm_topk_key is None or values[family.norm_topk_key]
    return overrides | {
        "model.rotary_base": int(theta),
        "model.untie_embeddings_and_output_weights": not values["tie_word_embeddings"],
        **family.feature_values(),
        "router.moe_router_score_function": "softmax",
        "router.moe_router_pre_softmax": not normalized,
    }


def defaulted_keys(config_json: Mapping[str, Any]) -> list[str]:
    """Return `key = value` for each key missing from config.json that has transformers' default."""
    family = _family_of_json(config_json)
    given = _without_aliases(config_json, family)
    unreported = {"head_dim", "sliding_window"}
    if rope_config.has_base(config_json):
        unreported.add("rope_theta")
    return [
        f"{key} = {show(value)}"
        for key, value in family.defaults.items()
        if key not in given and key not in unreported
    ]


def passthrough_values(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json that neither direction translates."""
    family = _family_of_json(config_json)
    translated = {
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "auto_map",
        "quantization_config",
        "compression_config",
        *family.defaults,
        *family.fixed,
        *family.aliases,
        *rope_config.KEYS,
    }
    return {key: value for key, value in config_json.items() if key not in translated}


def _family_of_json(config_json: Mapping[str, Any]) -> Family:
    model_type = config_json.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        *others, last = FAMILIES
        known = f"{', '.join(others)} and {last}"
        raise UserError(f"config.json: model_type = {show(model_type)}: mixtrain converts {known}")
    return family


def _without_aliases(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    return {family.aliases.get(key, key): value for key, value in values.items()}


def _is_one_of(value: Any, spellings: list[Any]) -> bool:
    """Whether `value` is in the list; unlike `in`, 1 is not true and 0 is not false."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in spellings
    )


def _size_problems(values: Mapping[str, Any], family: Family) -> list[str]:
    """Return the problems with the numbers of a config.json, each alone and in combination."""
    problems = []
    for key, _ in family.keys:
        value = values[key]
        most = MAX_SIZES.get(key, MAX_OTHER_SIZE)
        if value is None and key == "head_dim":
            continue
        elif key == "rms_norm_eps":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                problems.append(f"{key} = {show(value)} is not a number between 0 and 1")
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            problems.append(f"{key} = {show(value)} is not a whole number from 1 to {most:,}")
    if problems:
        return problems
    layers = values["num_hidden_layers"]
    topk = values["num_experts_per_tok"]
    (experts,) = (key for key, own_key in family.keys if own_key == "model.num_moe_experts")
    if topk > values[experts]:
        problems.append(f"num_experts_per_tok = {topk}, but {experts} = {values[experts]}")
    problems += [
        f"num_hidden_layers = {layers} with {key} = {values[key]}: their product must be at most"
        f" {MAX_LAYER_PRODUCT:,}"
        for key in (experts, "num_key_value_heads")
        if layers * values[key] > MAX_LAYER_PRODUCT
    ]
    head_dim = values.get("head_dim")
    heads = values["num_attention_heads"]
    if family.heads_fill_hidden and head_dim and head_dim * heads != values["hidden_size"]:
        problems.append(
            f"head_dim = {head_dim} times num_attention_heads = {heads} must be hidden_size ="
            f" {values['hidden_size']} in {family.name}"
        )
    divisions = [("num_key_value_heads", "num_attention_heads")]
    if values.get("head_dim") is None:
        divisions.append(("num_attention_heads", "hidden_size"))
    return problems + [
        f"{divisor} = {values[divisor]} must divide {key} = {values[key]}"
        for divisor, key in divisions
        if values[key] % values[divisor]
    ]
