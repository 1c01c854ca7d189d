"""Text that the command line's grammar or YAML reads as something else: 1.10, 0123, 12:00:00, true. No torch.

Rule: a text is taken as its characters, or not at all. A whole number is taken where its digits are what was written;
whatever else is no text is refused, with the quotes that make it one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from mixtrain.config.schema import SBATCH, holds_text, legal_keys
from mixtrain.system import yaml_file

HEADER = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)
DIGITS = re.compile(r"0|-?[1-9][0-9]*")  # of a whole number that is written in one way only
NAMES = {bool: "true or false", int: "a number", float: "a number", type(None): "null"}


def word_problem(override: Override) -> str | None:
    """What a word of the command line gives a key for text that is none, or None."""
    key = override.key_or_group
    written = override.input_line.partition("=")[2].strip()
    if not _takes_text(key):
        return None
    tokens = re.split(r"[\s,:()\[\]{}]+", written)
    for value in _scalars(override.value()):
        exact = type(value) is int and str(value) in tokens
        if isinstance(value, str) or exact or _may_be(key, value):
            continue
        several = isinstance(override.value(), (list, dict, ChoiceSweep))
        typed = "in quotes of its own: ['...','...']" if several else quoted(key, written)
        return f"{key} takes text, and {written} is read as {NAMES[type(value)]}; type {typed}"
    return None


def unreadable(text: str, reason: str) -> str:
    """The problem of a word that the grammar does not take: with the words that it does take, where quotes do."""
    key, equals, value = text.partition("=")
    if key and value.startswith("~"):
        return f"{text} cannot be read: nothing expands ~ behind an =; type {key}=$HOME{value[1:]}"
    word = f"{key}='{value}'"
    try:
        if not key or not equals or "'" in value:
            raise HydraException
        OverridesParser.create().parse_override(word)
    except HydraException:
        return (
            f"{text} cannot be read ({reason}); an override is key=value, the value quoted"
            " where it has other signs"
        )
    return f"{text} cannot be read without quotes ({reason}); type {quoted(key, value)}"


def quoted(key: str, value: str) -> str:
    """An override of one text as a shell takes it: name="'1.10'"."""
    return shlex.quote(f"{key}='{value}'") if set(value) & set('$`\\!"') else f"{key}=\"'{value}'\""


def file_problems(path: Path, conf: Path) -> Iterator[str]:
    """What a file of conf/ gives keys for text that is none."""
    header = HEADER.search(path.read_text())
    package = header[1] if header else ".".join(path.relative_to(conf).parent.parts)
    for name, text, kind, place in yaml_file.scalars(path):
        key = name if package == "_global_" or not package else f"{package}.{name}"
        exact = kind is int and DIGITS.fullmatch(text)
        if _takes_text(key) and not exact and not (kind is bool and _may_be(key, True)):
            yield (
                f"{place}: {key} takes text, and {text} is read as {NAMES[kind]}; write it in"
                f' quotes: "{text}"'
            )


def _takes_text(key: str) -> bool:
    kinds = legal_keys()
    return key.startswith(SBATCH) or key in kinds and holds_text(key)


def _may_be(key: str, value: Any) -> bool:
    """A flag of sbatch may be switched; a key may be null where its type says so."""
    if key.startswith(SBATCH):
        return isinstance(value, (bool, type(None)))
    return value is None and type(None) in getattr(legal_keys()[key], "__args__", ())


def _scalars(value: Any) -> Iterator[Any]:
    """The values in what a word gives: of a list, a mapping, the choices of a sweep."""
    if isinstance(value, ChoiceSweep):
        value = value.list
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _scalars(part)
    elif type(value) in NAMES:
        yield value
