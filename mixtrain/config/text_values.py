"""Refuse text that the override grammar or YAML reads as a number or bool: 1.10, 0123, 12:00:00.

Rule: a text key takes exactly the typed characters or nothing. A whole number is accepted if its
digits are the typed ones; other values are refused, with the quotes that make them text. No torch.
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

from mixtrain.config.schema import SBATCH, legal_keys
from mixtrain.config.typed_config import is_text_key
from mixtrain.system import yaml_file

HEADER = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)
DIGITS = re.compile(r"0|-?[1-9][0-9]*")  # the canonical form of a whole number
NAMES = {bool: "true or false", int: "a number", float: "a number", type(None): "null"}


def override_problem(override: Override) -> str | None:
    """Return a problem if an override gives a text key a value that is not text, or None."""
    key = override.key_or_group
    typed = override.input_line.partition("=")[2].strip()
    if not _takes_text(key):
        return None
    tokens = re.split(r"[\s,:()\[\]{}]+", typed)
    for value in _scalars(override.value()):
        exact = type(value) is int and str(value) in tokens
        if isinstance(value, str) or exact or _is_allowed(key, value):
            continue
        several = isinstance(override.value(), (list, dict, ChoiceSweep))
        advice = "it in its own quotes: ['...','...']" if several else quoted(key, typed)
        return f"{key} takes text, and {typed} is read as {NAMES[type(value)]}; type {advice}"
    return None


def unreadable(text: str, reason: str) -> str:
    """Return the problem of an override that the grammar refuses, with quotes if they help."""
    key, equals, value = text.partition("=")
    if key and value.startswith("~"):
        return f"{text} cannot be read: nothing expands ~ after =; type {key}=$HOME{value[1:]}"
    override = f"{key}='{value}'"
    try:
        if not key or not equals or "'" in value:
            raise HydraException
        OverridesParser.create().parse_override(override)
    except HydraException:
        return (
            f"{text} cannot be read ({reason}); an override is key=value, with quotes around a"
            " value that has special characters"
        )
    return f"{text} cannot be read without quotes ({reason}); type {quoted(key, value)}"


def quoted(key: str, value: str) -> str:
    """Return the override of one text, quoted for a shell: name="'1.10'"."""
    return shlex.quote(f"{key}='{value}'") if set(value) & set('$`\\!"') else f"{key}=\"'{value}'\""


def file_problems(path: Path, conf: Path) -> Iterator[str]:
    """Yield a problem for each text key of a file in conf/ whose value is not text."""
    header = HEADER.search(path.read_text())
    package = header[1] if header else ".".join(path.relative_to(conf).parent.parts)
    for name, text, kind, place in yaml_file.scalars(path):
        key = name if package == "_global_" or not package else f"{package}.{name}"
        exact = kind is int and DIGITS.fullmatch(text)
        if _takes_text(key) and not exact and not (kind is bool and _is_allowed(key, True)):
            yield (
                f"{place}: {key} takes text, and {text} is read as {NAMES[kind]}; write it in"
                f' quotes: "{text}"'
            )


def _takes_text(key: str) -> bool:
    kinds = legal_keys()
    return key.startswith(SBATCH) or key in kinds and is_text_key(key)


def _is_allowed(key: str, value: Any) -> bool:
    """Return whether a value is a legal null, or a bool or null of a flag of sbatch."""
    if key.startswith(SBATCH):
        return isinstance(value, (bool, type(None)))
    return value is None and type(None) in getattr(legal_keys()[key], "__args__", ())


def _scalars(value: Any) -> Iterator[Any]:
    """Yield the scalars in the value of an override: a list, a mapping, the choices of a sweep."""
    if isinstance(value, ChoiceSweep):
        value = value.list
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    elif type(value) in NAMES:
        yield value
