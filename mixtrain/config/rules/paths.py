"""Rules about texts and paths as they are written: none is empty, none means another place than it says. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mixtrain.config.key_effects import value_of
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems
from mixtrain.config.schema import WEIGHED, holds_text, legal_keys

OWN = ("run_dir", "data.path_to_cache")  # directories that a run fills
PATHS = (*OWN, WEIGHED, "data.tokenizer", "checkpoint.load_weights", "launcher.container_image",
         "launcher.container_mounts", "launcher.env_file")  # fmt: skip


def texts_are_not_empty(plan: Plan) -> Problems:
    """What `run_dir=$UNSET` gives: the directory "" is the current one."""
    for key, text in _texts(
        plan, [key for key in legal_keys() if holds_text(key) or key == WEIGHED]
    ):
        if not text.strip():
            null = " or null" if type(None) in getattr(legal_keys()[key], "__args__", ()) else ""
            yield (
                f"{key} is empty, as a variable of the shell that is not set leaves it; give a"
                f" text{null}"
            )


def paths_are_where_they_say(plan: Plan) -> Problems:
    for key, path in _texts(plan, PATHS):
        if path == "~" or path.startswith("~/"):
            yield (
                f"{key} = {path}: nothing expands ~ here; use the whole path, in a shell"
                f" $HOME{path[1:]}"
            )
    for key, path in _texts(plan, OWN):
        if path.strip() and not os.path.abspath(path).strip("/"):
            yield (
                f"{key} = {path} is the root of the file system, as $UNSET/ leaves it; give a"
                " directory of its own"
            )


def _texts(plan: Plan, keys: list[str] | tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(key, text) of every text that is given."""
    for key in keys:
        value = value_of(plan.config, key)
        for text in value if isinstance(value, list) else [value]:
            if text is not None:
                yield key, str(text)


RULES = [texts_are_not_empty, paths_are_where_they_say]
