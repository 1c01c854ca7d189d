"""What makes two configurations other models though their tensors have the same shapes, key by key. No torch.

Rule: a difference is refused with both values unless checkpoint.acknowledge_differences names its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixtrain.config.key_effects import FORWARD, show, value_of
from mixtrain.config.schema import Config
from mixtrain.config.transformer_fields import UNKNOWN, transformer_config_defaults

# fields of TransformerConfig that have no key of their own: ours are model.extra.FIELD
EXTRA = "model.extra."
KEY = "checkpoint.acknowledge_differences"
TOKENIZER = "data.tokenizer"  # checkpoint/same_tokenizer.py compares it
ABSENT = object()


class Difference(NamedTuple):
    """A key that has another value than the weights were made with."""

    key: str
    there: Any
    here: Any

    def told(self, checkpoint: Path) -> str:
        use = (
            ""
            if self.there is ABSENT or self.there is UNKNOWN
            else f"use {self.key}={_shown(self.there)}, or "
        )
        here = _shown(self.here)
        there = _shown(self.there)
        return (
            f"{self.key} = {here}, but the weights of {checkpoint} are for {there}; {use}name"
            f" the key in {KEY}"
        )


def differences(config: Config, there: Any) -> Iterator[Difference]:
    """How the model of a Config differs from that of another, resolved, as plain YAML has it."""
    for key in FORWARD:
        mine = value_of(config, key)
        other = _at(there, key)
        if (
            key == "dispatcher.moe_token_drop_policy"
            and config.dispatcher.moe_expert_capacity_factor is None
        ):
            continue  # none is dropped
        if key == "router.moe_router_enable_expert_bias" and mine and other is False:
            continue  # a bias starts at zero, and chooses as none does
        if other is ABSENT or _meaning(key, mine) != _meaning(key, other):
            yield Difference(key, other, mine)
    mine = config.model.extra
    other = _at(there, "model.extra")
    other = other if isinstance(other, Mapping) else {}
    defaults = transformer_config_defaults() or {}
    for field in sorted({*mine, *map(str, other)}):
        values = [extra.get(field, defaults.get(field, ABSENT)) for extra in (other, mine)]
        if values[0] != values[1]:
            yield Difference(EXTRA + field, *values)


def unknown(config: Config) -> list[str]:
    """What is acknowledged and is no such key."""
    return [
        key
        for key in config.checkpoint.acknowledge_differences
        if key not in (*FORWARD, TOKENIZER) and not key.startswith(EXTRA)
    ]


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part, ABSENT) if isinstance(tree, Mapping) else ABSENT
    return tree


def _meaning(key: str, value: Any) -> Any:
    """A value as it counts: of the ways to balance, sinkhorn alone chooses other experts."""
    if key == "router.moe_router_load_balancing_type":
        return value == "sinkhorn" or (isinstance(value, list) and "sinkhorn" in value)
    if key == "router.moe_router_topk_scaling_factor":
        return 1.0 if value is None else value
    return value


def _shown(value: Any) -> str:
    text = {id(ABSENT): "a value that is not known", id(UNKNOWN): "the default"}.get(
        id(value)
    ) or show(value)
    return text if text.isprintable() and len(text) < 100 else ascii(text)[:100]
