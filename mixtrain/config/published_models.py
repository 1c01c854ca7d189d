"""What a published model is, and where a configuration that names it differs. No torch.

Rule: a fact has its source in a comment of its file in published_models/ and is compared under the
key a user types; a difference is a warning, never an error: to change a published model is a user's
right, not to notice it is the harm.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mixtrain.config.schema import Config, leaves, plain

FOLDER = Path(__file__).resolve().parent / "published_models"

# What decides whether the weights of a published model fit and mean the same: a facts file has
# these and no others.
KEYS = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.num_moe_experts",
    "model.moe_router_topk",
    "model.moe_ffn_hidden_size",
    "model.moe_shared_expert_intermediate_size",
    "model.vocab_size",
    "model.max_position_embeddings",
    "model.rotary_base",
    "model.layernorm_epsilon",
    "model.untie_embeddings_and_output_weights",
    "model.qk_layernorm",
    "router.moe_router_score_function",
    "router.moe_router_pre_softmax",
)


def lint(config: Config) -> list[str]:
    """One warning for each key in which a Config is not the model that model.hf_model names, or does not train it."""
    name = config.model.hf_model
    facts = published().get(name, {})
    warnings = [
        f"{key} = {_shown(value)} differs from {name}, which has {_shown(facts[key])}"
        for key in facts
        if (value := _value(config, key)) != facts[key]
    ]
    if name is not None and name not in published():
        known = ", ".join(sorted(published()))
        warnings.append(
            f"model.hf_model = {name} has no facts to be held against; there are those of {known},"
            " and null"
        )
    if facts and (capacity := config.dispatcher.moe_expert_capacity_factor) is not None:
        warnings.append(
            f"dispatcher.moe_expert_capacity_factor = {capacity:g} drops the tokens that exceed"
            f" it; {name} drops none: use null"
        )
    if config.router.moe_router_force_load_balancing:
        warnings.append(
            "router.moe_router_force_load_balancing = true sends tokens to experts at random: good"
            " for timing alone"
        )
    return warnings


@cache
def published() -> dict[str, dict[str, Any]]:
    """{name on Hugging Face: {key: value}} of every file in mixtrain/config/published_models/."""
    return dict(read(path) for path in sorted(FOLDER.glob("*.yaml")))


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """(name on Hugging Face, {key: value}) of one file. ValueError if it has other keys than KEYS."""
    facts = dict(leaves(OmegaConf.to_container(OmegaConf.load(path))))
    name = facts.pop("hf_model", None)
    missing = sorted(set(KEYS) - set(facts))
    unknown = sorted(set(facts) - set(KEYS))
    if name is None or missing or unknown:
        raise ValueError(f"{path.name}: hf_model = {name}; missing {missing}; not a fact {unknown}")
    return name, facts


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return plain(getattr(getattr(config, section), name))


def _shown(value: Any) -> str:
    """A value as YAML has it: null, true, 1e-05."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
