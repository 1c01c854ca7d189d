"""A line `#SBATCH --flag=value`, as sbatch reads it back, and which values have none. No torch."""

from __future__ import annotations

from mixtrain.characters import CONTROL, escaped
from mixtrain.errors import UserError

MARK = "#SBATCH "
QUOTED = " #'"  # a value with one of these stands in double quotes


def unquotable(value: object) -> str | None:
    """What a value has that no #SBATCH line can hold, or None: a line break, or what ends or escapes a quotation."""
    if (
        isinstance(value, dict)
        or isinstance(value, (list, tuple))
        and any(isinstance(part, dict) for part in value)
    ):
        return "a mapping"
    if found := CONTROL.search(_text(value)):
        return f"the control character {escaped(found[0])}"
    return next(
        (
            name
            for sign, name in (('"', "a double quote"), ("\\", "a backslash"))
            if sign in _text(value)
        ),
        None,
    )


def directive(flag: str, value: object, key: str) -> str:
    """The line of one flag. UserError naming `key`, the value's origin, if the line could not hold the value."""
    if has := unquotable(value):
        raise UserError(
            f"{key} = {escaped(_text(value))} has {has}, which no #SBATCH line can hold; take it"
            " out"
        )
    if value is True:
        return f"{MARK}--{flag}\n"
    text = _text(value)
    return (
        f'{MARK}--{flag}="{text}"\n'
        if any(sign in text for sign in QUOTED)
        else f"{MARK}--{flag}={text}\n"
    )


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
