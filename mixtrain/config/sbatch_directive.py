"""Write a line `#SBATCH --flag=value` that sbatch reads back unchanged. No torch."""

from __future__ import annotations

from mixtrain.characters import CONTROL, escaped
from mixtrain.errors import UserError

MARK = "#SBATCH "
QUOTED = " #'"  # a value with one of these needs double quotes


def unquotable(value: object) -> str | None:
    """Return what in a value no #SBATCH line can contain, as a noun phrase, or None."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(item, dict) for item in items):
        return "a mapping"
    text = _text(value)
    if match := CONTROL.search(text):
        return f"the control character {escaped(match[0])}"
    if '"' in text:
        return "a double quote"
    return "a backslash" if "\\" in text else None


def directive(flag: str, value: object, key: str) -> str:
    """Return the line of a flag. Raises UserError that names `key` for an unquotable value."""
    text = _text(value)
    if character := unquotable(value):
        raise UserError(
            f"{key} = {escaped(text)} has {character}, which no #SBATCH line can contain; take it"
            " out"
        )
    if value is True:
        return f"{MARK}--{flag}\n"
    quote = '"' if any(character in text for character in QUOTED) else ""
    return f"{MARK}--{flag}={quote}{text}{quote}\n"


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
