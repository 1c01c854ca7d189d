"""Options that were typed, against what a recipe or a shrink lays over them. No torch.

Rule: a recipe and a shrink are composed last, so their values win over those of an option such as
`trainer=laptop`. Where the two differ, both were typed and neither is meant for certain: the keys
are named, and the user types them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mixtrain.config.compose import ADDED_GROUPS, CONF, Composed
from mixtrain.config.key_effects import show
from mixtrain.config.schema import leaves

OPEN = "???"  # the value of a key that an option leaves to be typed


def contradictions(job: Composed, conf: Path = CONF) -> list[str]:
    """A problem for each option among the job's overrides and each recipe or shrink that changes values of it."""
    words = _words(job.overrides)
    added = {group: words[group] for group in ADDED_GROUPS if group in words}
    composed = dict(leaves(OmegaConf.to_container(job.tree, resolve=False))) if added else {}
    shrink = _own("shrink", added["shrink"], conf) if "shrink" in added else {}
    problems = []
    for group in [key for key in words if added and key not in added and (conf / key).is_dir()]:
        option = _chosen(group, words, conf)
        changed = {key: value for key, value in option.items() if value != composed.get(key, value)}
        for name, values in _by_whom(changed, added, shrink).items():
            problems.append(
                f"{group}={words[group]} sets {_typed({key: option[key] for key in values})}, but"
                f" {name} sets {_typed({key: composed[key] for key in values})} over it; type each"
                " of these keys with the value you mean, or leave out one of the two"
            )
    return problems


def settled(overrides: list[str], shrink: str, conf: Path = CONF) -> list[str]:
    """The keys of the options among the overrides that `+shrink=...` would change, typed as it sets them."""
    words = _words(overrides)
    smaller = _own("shrink", shrink, conf)
    found = {}
    for group in [key for key in words if key not in ADDED_GROUPS and (conf / key).is_dir()]:
        option = _chosen(group, words, conf)
        found |= {
            key: smaller[key] for key, value in option.items() if smaller.get(key, value) != value
        }
    return [f"{key}={show(value)}" for key, value in found.items()]


def _chosen(group: str, words: dict[str, Any], conf: Path) -> dict[str, Any]:
    """The values of the option chosen of a group, without the keys that are typed beside it."""
    values = _own(group, words[group], conf)
    return {
        key: value for key, value in values.items() if value != OPEN and not _is_typed(key, words)
    }


def _is_typed(key: str, words: dict[str, Any]) -> bool:
    # model.extra.foo is of model.extra
    return any(f"{word}.".startswith(f"{key}.") for word in words)


def _by_whom(
    changed: dict[str, Any], added: dict[str, str], shrink: dict[str, Any]
) -> dict[str, list[str]]:
    """The changed keys by who set them last: a shrink is laid over the recipe."""
    found: dict[str, list[str]] = {}
    for key in changed:
        group = "shrink" if key in shrink else "recipe"
        found.setdefault(f"+{group}={added[group]}", []).append(key)
    return found


def _own(group: str, option: str, conf: Path) -> dict[str, Any]:
    """The keys that the option's own file sets, and their values; not what it takes over from another option."""
    body = OmegaConf.to_container(OmegaConf.load(conf / group / f"{option}.yaml"), resolve=False)
    body.pop("defaults", None)
    return dict(leaves(body if group in ADDED_GROUPS else {group: body}))


def _typed(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={show(value)}" for key, value in values.items())


def _words(overrides: list[str]) -> dict[str, Any]:
    """Keys and groups, and what was typed for each."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {override.key_or_group: override.value() for override in parsed}
