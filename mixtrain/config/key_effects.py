"""What a key changes, as schema.py declares it, and the changes of a recipe. No torch.

`mathematics`: the resulting model differs by more than the order of additions. `execution`: the
same model, faster, smaller or elsewhere (docs/parity.md has the proof and the few routers for which
a layout changes more). `records`: what is written, and when.
"""

from __future__ import annotations

from typing import NamedTuple

from mixtrain.config.schema import (
    EXECUTION,
    MATHEMATICS,
    RECORDS,
    Config,
    key_metadata,
    legal_keys,
)
from mixtrain.config.typed_config import plain

CLASSES = {
    effect: tuple(
        key for key, metadata in key_metadata().items() if metadata.get("effect") == effect
    )
    for effect in (MATHEMATICS, EXECUTION, RECORDS)
}
CLASS_OF = {key: effect for effect, keys in CLASSES.items() for key in keys}
# keys of the forward pass that do not show in a shape
FORWARD = [key for key, metadata in key_metadata().items() if metadata.get("is_forward")]


class Change(NamedTuple):
    """A key whose value differs from the recipe's."""

    key: str
    recipe: object
    value: object

    def __str__(self) -> str:
        return f"{self.key} = {show(self.value)} (recipe: {show(self.recipe)})"


def changes(recipe: Config, config: Config) -> dict[str, list[Change]]:
    """Return the differences from the recipe by class, without records."""
    by_class: dict[str, list[Change]] = {MATHEMATICS: [], EXECUTION: []}
    for key in legal_keys():
        before = value_of(recipe, key)
        after = value_of(config, key)
        if before != after and CLASS_OF[key] in by_class:
            by_class[CLASS_OF[key]].append(Change(key, before, after))
    return by_class


def value_of(config: Config, key: str) -> object:
    """Return the plain value of a dotted key."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return plain(value)


def show(value: object) -> str:
    """Return a value as a user would type it."""
    if isinstance(value, list):
        return f"[{','.join(show(item) for item in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
