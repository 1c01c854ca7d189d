"""Read YAML files; a mistake is one line with the file, the line and the column. No torch.

Rule: size, depth and the expansion of aliases are bounded before any object is built.
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

BYTES = 1 << 20  # maximum size of a file
DEPTH = 64  # maximum nesting of mappings and lists
SIZE = 1 << 22  # maximum expanded size: the characters, and NODE for each key and value
NODE = 16
# the names in an interpolation, including those in names and in arguments of a resolver
REFERENCE = re.compile(r"\$\{(?:oc\.[\w.]+:)?([^${}:,]*)")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KINDS = {
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:bool": bool,
}


def read(path: str | Path) -> DictConfig:
    """Return a file's mapping, interpolations unresolved. Raises UserError that names the place."""
    load_plain(path)
    try:
        tree = OmegaConf.load(path)
    except (OSError, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: keys with values are expected, as in seed: 1")
    return tree


def load_plain(path: str | Path) -> Any:
    """Return a file's value as plain Python, in a tenth of `read`'s time. Raises UserError."""
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES + 1)
        if len(data) > BYTES:
            raise UserError(f"{path}: larger than {BYTES:,} bytes, the most that is read")
        text = data.decode()
        _check_size(path, text)
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        message = f"{error.problem}, {error.context}" if error.context else str(error.problem)
        mark = error.problem_mark or error.context_mark
        raise UserError(_at(path, mark, message)) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position] if isinstance(error.character, int) else ""
        line = before.count("\n") + 1
        column = len(before) - before.rfind("\n")
        where = f"{path}, line {line}, column {column}"
        raise UserError(f"{where}: the character {error.character:#x} is not allowed") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {data[: error.start].count(10) + 1}: not UTF-8") from None
    except (OSError, yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: {reason}") from None


def scalars(path: str | Path) -> Iterator[tuple[str, str, type, str]]:
    """Yield (dotted key, text, type, place) of unquoted values that read as a number or bool."""
    waiting = [("", yaml.compose(Path(path).read_text(), Loader=Loader))]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            waiting += [(f"{key}.{name.value}".lstrip("."), value) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(key, value) for value in node.value]
        elif node is not None and not node.style and (kind := _type_unquoted(node.value)):
            mark = node.start_mark
            yield key, node.value, kind, f"{path}, line {mark.line + 1}, column {mark.column + 1}"


def _type_unquoted(text: str) -> type | None:
    """Return the type that OmegaConf reads from unquoted text; None for text and null."""
    table = get_yaml_loader().yaml_implicit_resolvers
    for tag, pattern in [*table.get(text[:1], []), *table.get(None, [])]:
        if pattern.match(text):
            return KINDS.get(tag)
    return None


def _at(path: str | Path, mark: Any, message: str) -> str:
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}: {message}"


class _OpenNode(NamedTuple):
    """A mapping or list whose end event has not come yet."""

    anchor: str
    is_mapping: bool
    item_sizes: list[int]  # of a mapping: key, value, key, value ...
    keys: set[tuple[str, bool]]


def _check_size(path: str | Path, text: str) -> None:
    """Raise UserError for too deep nesting, too large expanded aliases, or duplicate keys."""
    sizes: dict[str | None, int | None] = {}  # by anchor; None until its node ends
    open_nodes = [_OpenNode("", False, [], set())]
    for event in yaml.parse(text, Loader=Loader):
        size = None
        parent = open_nodes[-1]
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, NODE)  # PyYAML reports an unknown anchor
            if size is None:
                message = f"*{event.anchor} is inside the value that it stands for"
                raise UserError(_at(path, event.start_mark, message))
        elif isinstance(event, yaml.ScalarEvent):
            size = sizes[event.anchor] = NODE + len(event.value)
            key = (event.value, event.style in ("'", '"'))
            if parent.is_mapping and len(parent.item_sizes) % 2 == 0:
                if key in parent.keys:
                    message = f"the key {event.value} occurs twice"
                    raise UserError(_at(path, event.start_mark, message))
                parent.keys.add(key)
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes[event.anchor] = None
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            open_nodes.append(_OpenNode(event.anchor, is_mapping, [], set()))
            if len(open_nodes) > DEPTH:
                raise UserError(_at(path, event.start_mark, f"nested more than {DEPTH} deep"))
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = open_nodes.pop()
            size = sizes[closed.anchor] = NODE + sum(closed.item_sizes)
        if size is not None:
            open_nodes[-1].item_sizes.append(size)
            if size > SIZE:
                message = f"larger than {SIZE:,} bytes when its aliases are expanded"
                raise UserError(_at(path, event.start_mark, message))


def expansion_problem(tree: DictConfig) -> str:
    """Return which key would become too large by resolving interpolations, or ""."""
    texts = dict(_interpolated(OmegaConf.to_container(tree, resolve=False)))
    sizes: dict[str, int] = {}

    def size(key: str) -> int:
        if key not in sizes:
            sizes[key] = 0  # OmegaConf reports a cycle
            text = texts.get(key, "")
            if key in texts:
                keys = [_absolute(name, key) for name in REFERENCE.findall(text)]
            else:  # a section
                keys = [name for name in texts if name.startswith(f"{key}.")]
            sizes[key] = NODE + len(text) + sum(map(size, keys))
        return sizes[key]

    try:
        large = next((key for key in texts if size(key) > SIZE), None)
    except RecursionError:
        return "interpolations refer to one another too deeply"
    if large is None:
        return ""
    return f"{large} becomes larger than {SIZE:,} bytes when its interpolations are resolved"


def _interpolated(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every leaf with an interpolation."""
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _interpolated(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and "${" in value:
        yield key, value


def _absolute(name: str, key: str) -> str:
    """Return the dotted key of a reference in `key`: `.seed` is beside it, `..seed` a level up."""
    name = name.strip().replace("[", ".").replace("]", "")
    dots = len(name) - len(name.lstrip("."))
    return ".".join([*key.split(".")[:-dots], name[dots:]]) if dots else name
