"""Find keys by which two models differ although their tensors have the same shapes. No torch.

Rule: checkpoint loading refuses a difference, with both values, unless
checkpoint.acknowledge_differences names its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixtrain.config.key_effects import FORWARD, show, value_of
from mixtrain.config.schema import Config
from mixtrain.config.transformer_fields import UNKNOWN, transformer_config_defaults

# prefix for fields of TransformerConfig without a key of their own
EXTRA = "model.extra."
KEY = "checkpoint.acknowledge_differences"
TOKENIZER = "data.tokenizer"  # checkpoint/same_tokenizer.py compares it
ABSENT = object()
# the values of a checkpoint that was written before there was the key
OLDER = {
    "model.qk_layernorm_over": "head",
    "model.add_qkv_bias": False,
    "model.moe_shared_expert_gate": False,
}


class Difference(NamedTuple):
    """A key whose value differs from the one that the weights were trained with."""

    key: str
    trained: Any
    configured: Any

    def message(self, checkpoint: Path) -> str:
        use = ""
        if self.trained is not ABSENT and self.trained is not UNKNOWN:
            use = f"use {self.key}={_shown(self.trained)}, or "
        return (
            f"{self.key} = {_shown(self.configured)}, but the weights of {checkpoint} are for"
            f" {_shown(self.trained)}; {use}name the key in {KEY}"
        )


def differences(config: Config, trained: Any) -> Iterator[Difference]:
    """Yield the differences from the model of `trained`, a resolved configuration as plain YAML."""
    dropless = config.dispatcher.moe_expert_capacity_factor is None
    for key in FORWARD:
        configured = value_of(config, key)
        value = _at(trained, key)
        if value is ABSENT:
            value = OLDER.get(key, ABSENT)
        if key == "dispatcher.moe_token_drop_policy" and dropless:
            continue  # no token is dropped
        if key == "router.moe_router_enable_expert_bias" and configured and value is False:
            continue  # a bias of zero does not change the choice
        if value is ABSENT or _effect(key, configured) != _effect(key, value):
            yield Difference(key, value, configured)
    configured_extra = config.model.extra
    trained_extra = _at(trained, "model.extra")
    if not isinstance(trained_extra, Mapping):
        trained_extra = {}
    defaults = transformer_config_defaults() or {}
    for field in sorted({*configured_extra, *map(str, trained_extra)}):
        default = defaults.get(field, ABSENT)
        value = trained_extra.get(field, default)
        configured = configured_extra.get(field, default)
        if value != configured:
            yield Difference(EXTRA + field, value, configured)


def unknown(config: Config) -> list[str]:
    """Return the acknowledged keys that cannot differ between models."""
    return [
        key
        for key in config.checkpoint.acknowledge_differences
        if key not in (*FORWARD, TOKENIZER) and not key.startswith(EXTRA)
    ]


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name, ABSENT) if isinstance(tree, Mapping) else ABSENT
    return tree


def _effect(key: str, value: Any) -> Any:
    """Return what a value changes in the forward pass: of the balancing types only sinkhorn."""
    if key == "router.moe_router_load_balancing_type":
        return value == "sinkhorn" or (isinstance(value, list) and "sinkhorn" in value)
    if key == "router.moe_router_topk_scaling_factor":
        return 1.0 if value is None else value
    return value


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "an unknown value"
    text = "the default" if value is UNKNOWN else show(value)
    return text if text.isprintable() and len(text) < 100 else ascii(text)[:100]
