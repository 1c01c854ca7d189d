"""Rules about texts and paths: none is empty, none means another place than it seems. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mixtrain.config.key_effects import value_of
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems
from mixtrain.config.schema import BLEND, legal_keys
from mixtrain.config.typed_config import is_text_key

OUTPUT = ("run_dir", "data.path_to_cache")  # directories that a run writes to
PATHS = (
    *OUTPUT,
    BLEND,
    "data.tokenizer",
    "checkpoint.load_weights",
    "launcher.container_image",
    "launcher.container_mounts",
    "launcher.env_file",
)


def texts_are_not_empty(plan: Plan) -> Problems:
    """Refuse "", which `run_dir=$UNSET` gives: as a path it is the current directory."""
    keys = [key for key in legal_keys() if is_text_key(key) or key == BLEND]
    for key, text in _texts(plan, keys):
        if not text.strip():
            null = " or null" if type(None) in getattr(legal_keys()[key], "__args__", ()) else ""
            yield f"{key} is empty, which an unset shell variable also gives; give a text{null}"


def paths_are_unambiguous(plan: Plan) -> Problems:
    for key, path in _texts(plan, PATHS):
        if path == "~" or path.startswith("~/"):
            yield (
                f"{key} = {path}: nothing expands ~ here; use the whole path, in a shell"
                f" $HOME{path[1:]}"
            )
    for key, path in _texts(plan, OUTPUT):
        if path.strip() and not os.path.abspath(path).strip("/"):
            yield (
                f"{key} = {path} is the root of the file system, which $UNSET/ also gives; give a"
                " directory of its own"
            )


def _texts(plan: Plan, keys: list[str] | tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of every value that is not null."""
    for key in keys:
        value = value_of(plan.config, key)
        for text in value if isinstance(value, list) else [value]:
            if text is not None:
                yield key, str(text)


RULES = [texts_are_not_empty, paths_are_unambiguous]
