"""Read JSON that somebody else may have written or a disk may have damaged. No torch.

Rule: size, depth and numbers are bounded and duplicate keys are refused. Values are checked against
a schema, which is a Python type (dict[str, int], list[Name], a TypedDict). Nothing is converted.
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

# maximum bytes of a file
SMALL = 1 << 24  # settings
LARGE = 1 << 28  # lists of tensors, files or tokens
LINE = 1 << 26  # maximum bytes of a line
DEPTH = 64  # maximum nesting of objects and lists
DIGITS = 40  # maximum digits of a whole number: transformers writes 10**30 for "no limit"
SHOWN = 60  # characters of a wrong value in a message


class InvalidJson(UserError, ValueError):
    """A problem of a JSON file or text; a ValueError, too, for callers that can do without it."""


class Check(NamedTuple):
    """A condition on a value: Annotated[int, Check("an even number", lambda n: n % 2 == 0)]."""

    expected: str
    fits: Callable[[Any], bool]


def integer(minimum: int, maximum: int = 2**63 - 1) -> Any:
    """The schema of a whole number from `minimum` to `maximum`."""
    limit = f" to {maximum:,}" if maximum < 2**63 - 1 else ""
    expected = f"a whole number from {minimum}{limit}"
    return Annotated[int, Check(expected, lambda value: minimum <= value <= maximum)]


Count = integer(0)
Name = Annotated[
    str, Check("text without control characters", lambda value: not CONTROL.search(value))
]
Object = dict[str, Any]


def read(path: str | Path, schema: Any = Object, most: int = SMALL, missing: str = "") -> Any:
    """Return the value of a JSON file of at most `most` bytes. Raises InvalidJson.

    missing: what it means that the file does not exist, for the message.
    """
    try:
        data = _read_bytes(Path(path), most)
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
    """Yield (number from 1, line without its end); of a longer line the first LINE bytes.

    Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        number = 1
        while line := file.readline(LINE):
            yield number, line.rstrip(b"\r\n")
            while len(line) == LINE and not line.endswith(b"\n"):  # skip the rest of the line
                line = file.readline(LINE)
            number += 1


def parse(text: bytes | str, schema: Any = Object, only: str | None = None) -> Any:
    """Return the value of a JSON text. Raises InvalidJson.

    only: the one key that the caller reads; other keys may occur twice, and no number is checked.
    """
    try:
        # utf-8-sig: some editors write a byte order mark
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
    if text.count("[") + text.count("{") > DEPTH:  # otherwise it cannot be deeper
        _check_depth(value)
    if wrong := problem(value, schema):
        raise InvalidJson(wrong)
    return value


@cache
def _decoder(only: str | None) -> json.JSONDecoder:
    """Build the decoder once: for a short line, building takes longer than decoding."""
    hooks: dict[str, Any] = {"object_pairs_hook": lambda pairs: _unique(pairs, only)}
    if only is None:
        hooks |= {"parse_constant": _no_number, "parse_float": _finite, "parse_int": _short}
    return json.JSONDecoder(**hooks)


def _read_bytes(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file (a pipe would block). Raises ValueError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most:,} bytes, the most that is read")
    return data


def _unique(pairs: list[tuple[str, Any]], only: str | None) -> dict[str, Any]:
    """Return the pairs as a dict. Raises InvalidJson for a duplicate key (`only`: of that key)."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        duplicates = {name for name, _ in pairs if name in seen or seen.add(name)}
        if wrong := duplicates if only is None else duplicates & {only}:
            raise InvalidJson(f"the key {_shown(min(wrong))} occurs twice")
    return value


def _no_number(text: str) -> float:
    raise InvalidJson(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise InvalidJson(f"the number {text[:SHOWN]} is too large")
    return number


def _short(text: str) -> int:
    if len(text) > DIGITS:
        raise InvalidJson(f"a number of {len(text):,} digits; {DIGITS} are read at most")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        items = []
        for container in level:
            items += container.values() if isinstance(container, dict) else container
        level = [item for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise InvalidJson(f"nested more than {DEPTH} deep")


# Schemas


def problem(value: Any, schema: Any, where: str = "") -> str:
    """Return what is wrong with a value, naming the place in it, or ""."""
    if schema is Any:
        return ""
    origin = get_origin(schema)
    arguments = get_args(schema)
    if origin is Annotated:
        if wrong := problem(value, arguments[0], where):
            return wrong
        failed = [check for check in arguments[1:] if not check.fits(value)]
        return _is_not(value, failed[0].expected, where) if failed else ""
    if origin in (Union, types.UnionType):
        return _union_problem(value, arguments, where)
    if origin is Literal:
        return "" if value in arguments else _is_not(value, describe(schema), where)
    if not _has_type(value, schema):
        return _is_not(value, describe(schema), where)
    return next(filter(None, _item_problems(value, schema, where)), "")


def describe(schema: Any) -> str:
    """Return a schema's outermost type as a noun phrase."""
    if get_origin(schema) is Annotated:
        return get_args(schema)[1].expected
    if get_origin(schema) in (Union, types.UnionType):
        return " or ".join(map(describe, get_args(schema)))
    if get_origin(schema) is Literal:
        return f"one of {', '.join(map(str, get_args(schema)))}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return names.get(schema) or ("an object" if _json_type(schema) is dict else "a list")


def _union_problem(value: Any, schemas: tuple, where: str) -> str:
    """Return the problem by the member of the union that has the value's type, if there is one."""
    problems = [problem(value, schema, where) for schema in schemas]
    if "" in problems:
        return ""
    for schema, wrong in zip(schemas, problems, strict=True):
        if _has_type(value, schema):
            return wrong
    return _is_not(value, describe(Union[schemas]), where)  # noqa: UP007


def _item_problems(value: Any, schema: Any, where: str) -> Iterator[str]:
    """Yield the problem, or "", of each item of a value that has the schema's outermost type."""
    prefix = where and where + "."
    if is_typeddict(schema):
        hints, required = _keys(schema)
        for name in sorted(required - value.keys()):
            yield f"{prefix}{name} is missing"
        # in the schema's order, because a set has none
        for name in (name for name in hints if name in value):
            yield problem(value[name], hints[name], f"{prefix}{name}")
    elif get_origin(schema) is dict:
        key_schema, item_schema = get_args(schema)
        key_fits = _fast_check(key_schema)
        item_fits = _fast_check(item_schema)
        for name, item in value.items():
            if not key_fits(name):
                yield f"the key {problem(name, key_schema)}" + (f", in {where}" if where else "")
            if not item_fits(item):
                yield problem(item, item_schema, f"{prefix}{name}")
    elif get_origin(schema) is list:
        (item_schema,) = get_args(schema)
        item_fits = _fast_check(item_schema)
        for number, item in enumerate(value):
            if not item_fits(item):
                yield problem(item, item_schema, f"{where}[{number}]")
    elif get_origin(schema) is tuple:
        if len(value) != len(get_args(schema)):
            yield _is_not(value, f"a list of {len(get_args(schema))}", where)
        for number, (item, kind) in enumerate(zip(value, get_args(schema), strict=False)):
            yield problem(item, kind, f"{where}[{number}]")


@cache
def _fast_check(schema: Any) -> Callable[[Any], bool]:
    """Return a fast test for tables of a million values; False means `problem` must decide."""
    kind, *checks = get_args(schema) if get_origin(schema) is Annotated else (schema,)
    if kind is Any:
        return lambda value: True
    if kind not in (int, str):
        return lambda value: False
    fits = [check.fits for check in checks]
    return lambda value: type(value) is kind and all(check(value) for check in fits)


@cache
def _keys(schema: Any) -> tuple[dict[str, Any], set[str]]:
    """Return (key -> schema, required keys) of a TypedDict.

    TypedDict's __required_keys__ is wrong for annotations that are strings.
    """
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


def _json_type(schema: Any) -> type:
    """Return the Python type of a JSON value of the schema."""
    schema = get_args(schema)[0] if get_origin(schema) is Annotated else schema
    if is_typeddict(schema):
        return dict
    origin = get_origin(schema) or schema
    return list if origin is tuple else origin


def _has_type(value: Any, schema: Any) -> bool:
    kind = _json_type(schema)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _is_not(value: Any, expected: str, where: str) -> str:
    return f"{where + ' = ' if where else ''}{_shown(value)} is not {expected}"


def _shown(value: Any) -> str:
    """Return the value as JSON, shortened."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
