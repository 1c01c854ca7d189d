"""Find typed options whose values a recipe or a shrink overrides. No torch.

Rule: a recipe and a shrink are composed last, so their values win over those of an option such as
`trainer=laptop`. If the values differ, the intention is unclear: the command is refused, and the
user types the keys that it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mixtrain.config.compose import ADDED_GROUPS, CONF, ComposedJob
from mixtrain.config.key_effects import show
from mixtrain.config.schema import leaves

OPEN = "???"  # the value of a key that the user must type


def contradictions(job: ComposedJob, conf: Path = CONF) -> list[str]:
    """Return a problem for each typed option with values that the recipe or shrink overrides."""
    typed = _parse(job.overrides)
    added = {group: typed[group] for group in ADDED_GROUPS if group in typed}
    if not added:
        return []
    composed = dict(leaves(OmegaConf.to_container(job.tree, resolve=False)))
    shrink = _values_of("shrink", added["shrink"], conf) if "shrink" in added else {}
    problems = []
    for group in _typed_groups(typed, conf):
        option = _untyped_values(group, typed, conf)
        keys_by_source: dict[str, list[str]] = {}
        for key, value in option.items():
            if value != composed.get(key, value):
                # a shrink is composed after the recipe
                source = "shrink" if key in shrink else "recipe"
                keys_by_source.setdefault(f"+{source}={added[source]}", []).append(key)
        for source, keys in keys_by_source.items():
            problems.append(
                f"{group}={typed[group]} sets {_as_overrides(option, keys)}, but {source} changes"
                f" this to {_as_overrides(composed, keys)}; type each of these keys with the value"
                " you mean, or leave out one of the two"
            )
    return problems


def shrink_overrides(overrides: list[str], shrink: str, conf: Path = CONF) -> list[str]:
    """Return overrides for the keys of typed options that `+shrink=...` would change."""
    typed = _parse(overrides)
    shrink_values = _values_of("shrink", shrink, conf)
    changed = {}
    for group in _typed_groups(typed, conf):
        for key, value in _untyped_values(group, typed, conf).items():
            if shrink_values.get(key, value) != value:
                changed[key] = shrink_values[key]
    return [f"{key}={show(value)}" for key, value in changed.items()]


def _typed_groups(typed: dict[str, Any], conf: Path) -> list[str]:
    return [key for key in typed if key not in ADDED_GROUPS and (conf / key).is_dir()]


def _untyped_values(group: str, typed: dict[str, Any], conf: Path) -> dict[str, Any]:
    """Return the values of the group's option, without keys that the user has typed as well."""
    values = _values_of(group, typed[group], conf)
    return {
        key: value for key, value in values.items() if value != OPEN and not _is_typed(key, typed)
    }


def _is_typed(key: str, typed: dict[str, Any]) -> bool:
    # typing model.extra.foo counts for model.extra
    return any(f"{name}.".startswith(f"{key}.") for name in typed)


def _values_of(group: str, option: str, conf: Path) -> dict[str, Any]:
    """Return {key: value} of the option, with its group's _base.yaml."""
    body = OmegaConf.to_container(OmegaConf.load(conf / group / f"{option}.yaml"), resolve=False)
    for base in body.pop("defaults", []):
        if isinstance(base, str):  # a file of the same group
            own = OmegaConf.load(conf / group / f"{base}.yaml")
            body = OmegaConf.to_container(own, resolve=False) | body
    return dict(leaves(body if group in ADDED_GROUPS else {group: body}))


def _as_overrides(values: dict[str, Any], keys: list[str]) -> str:
    return " ".join(f"{key}={show(values[key])}" for key in keys)


def _parse(overrides: list[str]) -> dict[str, Any]:
    """Return {key or group: value} of the overrides."""
    words = [override for override in overrides if not override.startswith("--config-dir=")]
    parsed = OverridesParser.create().parse_overrides(words)
    return {override.key_or_group: override.value() for override in parsed}
