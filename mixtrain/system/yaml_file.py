"""A YAML file that somebody has written: what is wrong with it in one line, with the file, the line and the column.

Rule: its size, its depth and what its aliases multiply to have bounds before anything is made of it. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from mixtrain.errors import UserError

BYTES = 1 << 20
DEPTH = 64  # mappings and lists inside one another
SIZE = 1 << 22  # characters, and NODE for each value and key, with every alias written out
NODE = 16
# the names in an interpolation, those in names and in a resolver's arguments too
REFERENCE = re.compile(r"\$\{(?:oc\.[\w.]+:)?([^${}:,]*)")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KINDS = {
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:bool": bool,
}


def read(path: str | Path) -> DictConfig:
    """The mapping of a file, its interpolations as they stand. UserError naming the place where it is wrong."""
    plain(path)
    try:
        tree = OmegaConf.load(path)
    except (OSError, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: keys with values are expected, as in seed: 1")
    return tree


def plain(path: str | Path) -> Any:
    """What a file holds, as Python's own types: in a tenth of the time. UserError as of `read`."""
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES + 1)
        if len(data) > BYTES:
            raise UserError(f"{path}: more than {BYTES:,} bytes, and no such file has them")
        text = data.decode()
        _bound(path, text)
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(
            _at(path, error.problem_mark or error.context_mark, _words(error))
        ) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position] if isinstance(error.character, int) else ""
        line = before.count("\n") + 1
        column = len(before) - before.rfind("\n")
        where = f"{path}, line {line}, column {column}"
        raise UserError(f"{where}: the character {error.character:#x} cannot stand in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {data[: error.start].count(10) + 1}: not UTF-8") from None
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{path}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
        ) from None


def scalars(path: str | Path) -> Iterator[tuple[str, str, type, str]]:
    """(dotted key, text, int, float or bool, place) of every value without quotes that OmegaConf reads as one."""
    waiting = [("", yaml.compose(Path(path).read_text(), Loader=Loader))]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            waiting += [(f"{key}.{name.value}".lstrip("."), value) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(key, value) for value in node.value]
        elif node is not None and not node.style and (kind := _kind(node.value)):
            mark = node.start_mark
            yield key, node.value, kind, f"{path}, line {mark.line + 1}, column {mark.column + 1}"


def _kind(text: str) -> type | None:
    """What OmegaConf makes of a text without quotes; None for a text, and for null."""
    table = get_yaml_loader().yaml_implicit_resolvers
    tags = [
        tag
        for tag, pattern in [*table.get(text[:1], []), *table.get(None, [])]
        if pattern.match(text)
    ]
    return KINDS.get(tags[0]) if tags else None


def _at(path: str | Path, mark: Any, words: str) -> str:
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}: {words}"


def _words(error: yaml.MarkedYAMLError) -> str:
    """What PyYAML says, and in the midst of what."""
    return f"{error.problem}, {error.context}" if error.context else str(error.problem)


class _Open(NamedTuple):
    """A mapping or a list that an event lies in."""

    anchor: str
    is_mapping: bool
    parts: list[int]  # sizes: of a mapping's in turn a key's and its value's
    keys: set[tuple[str, bool]]


def _bound(path: str | Path, text: str) -> None:
    """UserError if a file is nested too deep, its aliases make too much of it, or a key stands in a mapping twice."""
    sizes: dict[str | None, int | None] = {}  # of what an anchor marks; None while it is open
    around = [_Open("", False, [], set())]
    for event in yaml.parse(text, Loader=Loader):
        size = None
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, NODE)  # one that there is not: PyYAML says so
            if size is None:
                raise UserError(
                    _at(path, event.start_mark, f"*{event.anchor} stands inside what it means")
                )
        elif isinstance(event, yaml.ScalarEvent):
            size = sizes[event.anchor] = NODE + len(event.value)
            key = (event.value, event.style in ("'", '"'))
            if around[-1].is_mapping and len(around[-1].parts) % 2 == 0:
                if key in around[-1].keys:
                    raise UserError(
                        _at(path, event.start_mark, f"the key {event.value} stands there twice")
                    )
                around[-1].keys.add(key)
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes[event.anchor] = None
            around.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent), [], set()))
            if len(around) > DEPTH:
                raise UserError(_at(path, event.start_mark, f"nested more than {DEPTH} deep"))
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = around.pop()
            size = sizes[closed.anchor] = NODE + sum(closed.parts)
        if size is not None:
            around[-1].parts.append(size)
            if size > SIZE:
                raise UserError(
                    _at(
                        path,
                        event.start_mark,
                        f"written out without aliases it is larger than {SIZE:,} bytes",
                    )
                )


def growth(tree: DictConfig) -> str:
    """What the interpolations of a composed tree make too large, naming the key, or "". Nothing is resolved for it."""
    texts = dict(_texts(OmegaConf.to_container(tree, resolve=False)))
    sizes: dict[str, int] = {}

    def size(key: str) -> int:
        if key not in sizes:
            sizes[key] = 0  # where it comes back to itself OmegaConf says so
            inside = (
                [name for name in texts if name.startswith(f"{key}.")] if key not in texts else []
            )
            named = [_absolute(name, key) for name in REFERENCE.findall(texts.get(key, ""))]
            sizes[key] = NODE + len(texts.get(key, "")) + sum(map(size, inside + named))
        return sizes[key]

    try:
        large = next((key for key in texts if size(key) > SIZE), None)
    except RecursionError:
        return "interpolations lead on from one another without an end"
    return (
        f"{large} becomes larger than {SIZE:,} bytes when its interpolations are written out"
        if large
        else ""
    )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf with an interpolation."""
    if isinstance(value, (dict, list)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and "${" in value:
        yield key, value


def _absolute(name: str, key: str) -> str:
    """The dotted key that a name in an interpolation of `key` means; `.seed` is beside it, `..seed` a section up."""
    name = name.strip().replace("[", ".").replace("]", "")
    dots = len(name) - len(name.lstrip("."))
    return ".".join([*key.split(".")[:-dots], name[dots:]]) if dots else name
