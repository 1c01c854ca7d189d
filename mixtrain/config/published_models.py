"""Values of published models, and warnings where a configuration differs from its model. No torch.

Rule: the values are those of conf/model, whose files name their sources; a family's file
(config/families) says which published model has which file and where it differs. A difference is a
warning, not an error, because a user may change a model on purpose.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from omegaconf import OmegaConf

from mixtrain.config.families import FAMILIES
from mixtrain.config.key_effects import show, value_of
from mixtrain.config.schema import Config
from mixtrain.paths import CONF

# keys that decide whether published weights fit and compute the same
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
    "model.qk_layernorm_over",
    "model.add_qkv_bias",
    "model.moe_shared_expert_gate",
    "router.moe_router_score_function",
    "router.moe_router_pre_softmax",
)


def warnings(config: Config) -> list[str]:
    """Return a warning for each key that differs from the model that model.hf_model names."""
    name = config.model.hf_model
    published_values = published().get(name, {})
    sentences = []
    for key, published_value in published_values.items():
        value = value_of(config, key)
        if value != published_value:
            sentences.append(
                f"{key} = {show(value)} differs from {name}, which has {show(published_value)}"
            )
    if name is not None and name not in published():
        known = ", ".join(sorted(published()))
        sentences.append(
            f"model.hf_model = {name} is not a known model, so nothing is compared; the known"
            f" models are {known}, and null"
        )
    capacity = config.dispatcher.moe_expert_capacity_factor
    if published_values and capacity is not None:
        sentences.append(
            f"dispatcher.moe_expert_capacity_factor = {capacity:g} drops the tokens that exceed"
            f" it; {name} drops none: use null"
        )
    if config.router.moe_router_force_load_balancing:
        sentences.append(
            "router.moe_router_force_load_balancing = true sends tokens to experts at random: only"
            " for timing"
        )
    return sentences


@cache
def published() -> dict[str, dict[str, Any]]:
    """Return {name on Hugging Face: {key: value}} of the published models of every family."""
    base = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "_base.yaml"))
    models = {}
    for family in FAMILIES.values():
        for name, (option, differences) in family.published.items():
            own = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{option}.yaml"))
            values = {f"model.{key}": value for key, value in (base | own).items()}
            values |= {
                "router.moe_router_score_function": "softmax",
                "router.moe_router_pre_softmax": False,
            }
            models[name] = {key: (values | differences)[key] for key in KEYS}
    return models
