"""Make the typed Config of a composed tree, or name every key that is wrong. No torch.

Rule: a value that is not of its key's type is refused, never converted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_args, get_origin

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from mixtrain import characters
from mixtrain.config.schema import BLEND, FREE, Config, key_metadata, legal_keys
from mixtrain.errors import UserError


def from_hydra(composed: DictConfig, known: list[str] | None = None) -> Config:
    """Return the typed Config of a composed tree.

    Raises UserError with the `known` problems and every unknown, missing or illegal key.
    """
    schema = OmegaConf.structured(Config)
    problems = list(known or [])
    known_count = len(problems)
    try:
        tree = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(*problems, f"{error.full_key} cannot be resolved: {reason}") from None
    values = list(leaves(tree))
    unprintable = [p for key, value in values for p in characters.problems(key, value)]
    if unprintable:
        raise UserError(*problems, *unprintable)
    for key, value in values:
        problems += _set(schema, key, value)
    missing = sorted(OmegaConf.missing_keys(schema))
    named = {problem.split(" ")[0] for problem in problems}
    problems += [f"{key} has no value; type {key}=..." for key in missing if key not in named]
    problems += _out_of_bounds(schema)
    if len(problems) > known_count:
        raise UserError(*problems)
    return OmegaConf.to_object(schema)


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf; a free mapping is one leaf."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in FREE:
            yield from leaves(value, key + ".")
        else:
            yield key, value


def is_text_key(key: str) -> bool:
    """Return whether the key takes a text or a list of texts."""
    kind = legal_keys()[key]
    types = {kind, *get_args(kind)}
    types |= {inner for argument in get_args(kind) for inner in get_args(argument)}
    return str in types and get_origin(kind) is not dict and key != BLEND


def unknown_key(key: str) -> str:
    """Return the problem of an unknown key, with similar keys by full name and by last part."""
    by_last_part = {}
    for name in legal_keys():
        by_last_part.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    similar = get_close_matches(key, list(legal_keys()), n=3, cutoff=0.75)
    for last in get_close_matches(key.rsplit(".", 1)[-1], list(by_last_part), n=2, cutoff=0.7):
        similar += [name for name in by_last_part[last] if name not in similar]
    hint = f"did you mean {' or '.join(similar[:3])}?"
    if not similar:
        hint = "`python train.py --help` lists all keys"
    return f"{key} is not a key of mixtrain; {hint}"


def describe(kind: Any) -> str:
    """Return a type as a noun phrase: `a whole number or null`, `one of cpu, gpu`."""
    arguments = get_args(kind)
    if type(None) in arguments:
        return f"{describe(arguments[0])} or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in names:
        return names[kind]
    return "a list, as in [a,b]" if "list" in str(kind) else "a mapping, as in {field: value}"


def _set(schema: DictConfig, key: str, value: Any) -> list[str]:
    """Set one leaf of the schema; return a problem if the key is unknown or the value illegal."""
    kinds = legal_keys()
    if key not in kinds:
        return [unknown_key(key)]
    if value == MISSING:
        return []
    if get_origin(kinds[key]) is list and value is not None and not isinstance(value, list):
        value = [value]  # a list of one item may be typed as the item
    try:
        if any(
            _is_converted(key, item) for item in (value if isinstance(value, list) else [value])
        ):
            raise ValidationError
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        advice = ""
        if is_text_key(key) and not isinstance(value, (list, dict)):
            advice = '; put it in quotes in a file: "1.10"'
        shown = "null" if value is None else value
        return [f"{key} = {shown} must be {describe(kinds[key])}{advice}"]
    return []


def _is_converted(key: str, value: Any) -> bool:
    """Return whether OmegaConf would convert the value to the key's type without an error.

    It converts true to the number 1 and 2.0 to 2, 2 to the bool true, 2 to the second name of a
    choice, and 1.10 to the text 1.1.
    """
    kind = legal_keys()[key]
    kind = get_args(kind)[0] if type(None) in get_args(kind) else kind
    kind = get_args(kind)[0] if get_origin(kind) is list else kind
    if kind is int:
        return isinstance(value, (bool, float))
    if kind is bool:
        return type(value) in (int, float)
    if kind is str:
        return isinstance(value, bool) or isinstance(value, float) and key != BLEND
    return isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, (int, float))


def _out_of_bounds(schema: DictConfig) -> Iterator[str]:
    for key, metadata in key_metadata().items():
        value = OmegaConf.select(schema, key)  # None: null, or missing
        for item in value if isinstance(value, ListConfig) else [value]:
            if isinstance(item, (int, float)) and (bound := _violated_bound(item, metadata)):
                yield f"{key} = {item} must be {bound}"


def _violated_bound(value: float, bounds: Mapping[str, float]) -> str | None:
    """Return the bound that a number violates, or None."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "below 2^63"  # the limit of tensor sizes, steps and seeds
    if not math.isfinite(value):
        return "a finite number"
    if "minimum" in bounds and value < bounds["minimum"]:
        return f"at least {bounds['minimum']}"
    if "above" in bounds and value <= bounds["above"]:
        return f"above {bounds['above']}"
    if "below" in bounds and value >= bounds["below"]:
        return f"below {bounds['below']}"
    return None


def plain(value: Any) -> Any:
    """Return a Config value with enums as their names, as in YAML and Megatron-Core."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML that `from_hydra` reads back to the same Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
