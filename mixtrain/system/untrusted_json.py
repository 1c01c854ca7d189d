"""The one reader of JSON that somebody else may have written, or that a disk may have damaged. No torch.

Rule: size, depth and numbers have bounds, and no key stands twice; what a text holds is checked against a schema, which
is a Python type (dict[str, int], list[Name], a TypedDict). Nothing is converted and nothing is guessed.
"""

from __future__ import annotations

import json
import math
import os
import stat
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from mixtrain.characters import CONTROL
from mixtrain.errors import UserError

# bytes of a file, at most: settings; lists of tensors, of files, of tokens
SMALL = 1 << 24
LARGE = 1 << 28
LINE = 1 << 26  # bytes of a line, at most
DEPTH = 64  # objects and lists inside one another
DIGITS = 40  # of a whole number: transformers writes 10**30 for "no limit"
SHOWN = 60  # characters of a value that is not what it should be


class InvalidJson(UserError, ValueError):
    """What is wrong with a file, naming it. It is a ValueError, too: for who can do without the file."""


class Check(NamedTuple):
    """What a value must be beyond its type: Annotated[int, Check("an even number", lambda value: value % 2 == 0)]."""

    words: str
    fits: Callable[[Any], bool]


def whole(least: int, most: int = 2**63 - 1) -> Any:
    """A whole number from `least` to `most`."""
    limit = f" to {most:,}" if most < 2**63 - 1 else ""
    return Annotated[
        int, Check(f"a whole number from {least}{limit}", lambda value: least <= value <= most)
    ]


Count = whole(0)
Name = Annotated[
    str, Check("text without control characters", lambda value: not CONTROL.search(value))
]
Object = dict[str, Any]


def read(path: str | Path, schema: Any = Object, most: int = SMALL, missing: str = "") -> Any:
    """What a JSON file holds. InvalidJson naming it if it is damaged or not there (`missing`: what that means)."""
    try:
        data = _bytes(Path(path), most)
    except FileNotFoundError:
        raise InvalidJson(f"{path} is missing{missing and ': '}{missing}") from None
    except OSError as error:
        raise InvalidJson(f"{path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise InvalidJson(f"{path} is refused: {error}") from None
    try:
        return parse(data, schema)
    except InvalidJson as error:
        raise InvalidJson(f"{path} is damaged: {error}") from None


def lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file of JSON lines, without its end; of a line over LINE bytes no more than these.

    OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        number = 1
        while line := file.readline(LINE):
            yield number, line.rstrip(b"\r\n")
            while len(line) == LINE and not line.endswith(b"\n"):  # the rest of it
                line = file.readline(LINE)
            number += 1


def parse(text: bytes | str, schema: Any = Object, only: str | None = None) -> Any:
    """What a JSON text holds. InvalidJson with what is wrong.

    `only`: the one key that is read; the numbers beside it may be anything, and other keys may
    stand twice.
    """
    try:
        # some editors begin it with a mark
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = _decoder(only).decode(text)
    except InvalidJson:
        raise
    except UnicodeDecodeError as error:
        raise InvalidJson(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidJson(f"nested more than {DEPTH} deep") from None
    except ValueError as error:
        raise InvalidJson(f"not valid JSON ({error})") from None
    if text.count("[") + text.count("{") > DEPTH:  # else it cannot be deeper
        _bound_depth(value)
    if wrong := problem(value, schema):
        raise InvalidJson(wrong)
    return value


@cache
def _decoder(only: str | None) -> json.JSONDecoder:
    """Made once: of millions of lines that takes longer than to read them."""
    hooks: dict[str, Any] = {"object_pairs_hook": lambda pairs: _unique(pairs, only)}
    if only is None:
        hooks |= {"parse_constant": _no_number, "parse_float": _finite, "parse_int": _short}
    return json.JSONDecoder(**hooks)


def _bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file. ValueError if it is another thing (a pipe would be waited for), or too large."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("no regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes, and no such file has them")
    return data


def _unique(pairs: list[tuple[str, Any]], only: str | None) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = {name for name, _ in pairs if name in seen or seen.add(name)}
        if wrong := twice if only is None else twice & {only}:
            raise InvalidJson(f"the key {_shown(min(wrong))} stands in it twice")
    return found


def _no_number(text: str) -> float:
    raise InvalidJson(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise InvalidJson(f"the number {text[:SHOWN]} is too large")
    return number


def _short(text: str) -> int:
    if len(text) > DIGITS:
        raise InvalidJson(f"a number of {len(text):,} digits; {DIGITS} are read at most")
    return int(text)


def _bound_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            part
            for whole in level
            for part in (
                whole.values()
                if isinstance(whole, dict)
                else whole
                if isinstance(whole, list)
                else ()
            )
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise InvalidJson(f"nested more than {DEPTH} deep")


# Schemas


def problem(value: Any, schema: Any, where: str = "") -> str:
    """What is wrong with a value, naming the place in it, or ""."""
    if schema is Any:
        return ""
    origin = get_origin(schema)
    arguments = get_args(schema)
    if origin is Annotated:
        if wrong := problem(value, arguments[0], where):
            return wrong
        return next(
            (
                _is_not(value, check.words, where)
                for check in arguments[1:]
                if not check.fits(value)
            ),
            "",
        )
    if origin in (Union, types.UnionType):
        return _of_several(value, arguments, where)
    if origin is Literal:
        return "" if value in arguments else _is_not(value, describe(schema), where)
    if not _is_of(value, schema):
        return _is_not(value, describe(schema), where)
    return next(filter(None, _parts(value, schema, where)), "")


def describe(schema: Any) -> str:
    """A schema's outermost type as a sentence has it."""
    if get_origin(schema) is Annotated:
        return get_args(schema)[1].words
    if get_origin(schema) in (Union, types.UnionType):
        return " or ".join(map(describe, get_args(schema)))
    if get_origin(schema) is Literal:
        return f"one of {', '.join(map(str, get_args(schema)))}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return words.get(schema) or ("an object" if _type_of(schema) is dict else "a list")


def _of_several(value: Any, schemas: tuple, where: str) -> str:
    """Of a union the one that has the value's type says what is wrong inside."""
    found = [problem(value, schema, where) for schema in schemas]
    if "" in found:
        return ""
    inside = [wrong for schema, wrong in zip(schemas, found, strict=True) if _is_of(value, schema)]
    return inside[0] if inside else _is_not(value, describe(Union[schemas]), where)  # noqa: UP007


def _parts(value: Any, schema: Any, where: str) -> Iterator[str]:
    """What is wrong with each part of a value that has the schema's type itself."""
    if is_typeddict(schema):
        hints, required = _keys(schema)
        for name in sorted(required - value.keys()):
            yield f"{where and where + '.'}{name} is missing"
        # in the schema's order: a set has none
        for name in (name for name in hints if name in value):
            yield problem(value[name], hints[name], f"{where and where + '.'}{name}")
    elif get_origin(schema) is dict:
        of_name, of_part = get_args(schema)
        right = _leaf(of_part)
        named = _leaf(of_name)
        for name, part in value.items():
            if not named(name):
                yield f"the key {problem(name, of_name)}" + (f", in {where}" if where else "")
            if not right(part):
                yield problem(part, of_part, f"{where and where + '.'}{name}")
    elif get_origin(schema) is list:
        (of_part,) = get_args(schema)
        right = _leaf(of_part)
        for number, part in enumerate(value):
            if not right(part):
                yield problem(part, of_part, f"{where}[{number}]")
    elif get_origin(schema) is tuple:
        if len(value) != len(get_args(schema)):
            yield _is_not(value, f"a list of {len(get_args(schema))}", where)
        for number, (part, kind) in enumerate(zip(value, get_args(schema), strict=False)):
            yield problem(part, kind, f"{where}[{number}]")


@cache
def _leaf(schema: Any) -> Callable[[Any], bool]:
    """A quick answer to whether a value fits, for tables of a million; false where it must be looked at whole."""
    kind, *checks = get_args(schema) if get_origin(schema) is Annotated else (schema,)
    if kind is Any:
        return lambda value: True
    if kind not in (int, str):
        return lambda value: False
    fits = [check.fits for check in checks]
    return lambda value: type(value) is kind and all(check(value) for check in fits)


@cache
def _keys(schema: Any) -> tuple[dict[str, Any], set[str]]:
    """(key -> schema, those that must be there) of a TypedDict: its own marks are not read of annotations as text."""
    hints = get_type_hints(schema, include_extras=True)
    marks = {name: get_origin(hint) for name, hint in hints.items()}
    required = {
        name
        for name in hints
        if marks[name] is Required or schema.__total__ and marks[name] is not NotRequired
    }
    return {
        name: get_args(hint)[0] if marks[name] in (Required, NotRequired) else hint
        for name, hint in hints.items()
    }, required


def _type_of(schema: Any) -> type:
    """The Python type that a JSON value of a schema has."""
    schema = get_args(schema)[0] if get_origin(schema) is Annotated else schema
    if is_typeddict(schema):
        return dict
    origin = get_origin(schema) or schema
    return list if origin is tuple else origin


def _is_of(value: Any, schema: Any) -> bool:
    kind = _type_of(schema)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _is_not(value: Any, words: str, where: str) -> str:
    return f"{where + ' = ' if where else ''}{_shown(value)} is not {words}"


def _shown(value: Any) -> str:
    """A value as JSON has it, short."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
