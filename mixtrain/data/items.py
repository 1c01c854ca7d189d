"""Documents yet to be read, and blocks of them: what a source hands to the workers.

The rule it keeps: an item that gives no text says why, under its name.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtrain.data.compressed import read
from mixtrain.data.directory import POINTER
from mixtrain.system import untrusted_json

# of a block, at most (but a single item may be larger)
BLOCK_ITEMS = 256
BLOCK_BYTES = 1 << 20
KEYS_SHOWN = 8  # of a JSON line that lacks the one asked for


class Unreadable(Exception):
    """An item that holds no text, and why: counted and named by whoever reads the source.

    `once`: what many items of a source may have in common, so that it is worth a single line.
    """

    def __init__(self, why: str, once: str = ""):
        super().__init__(why)
        self.once = once


@dataclass
class Item:
    """One document yet to be read: its name, and its path, its raw JSON line (with a key) or what a row holds."""

    name: str
    content: object
    json_key: str | None = None
    size: int = 1  # in the unit of its source, for the progress display

    def text(self) -> str:
        """The document's text. Raises Unreadable with the reason where there is none."""
        try:
            if self.json_key is not None:
                text = _json_text(self.content, self.json_key)
            elif isinstance(self.content, Path):
                text = _file_text(self.content)
            # a column of a parquet file that nobody marked as text
            elif isinstance(self.content, bytes):
                text = self.content.decode("utf-8-sig")
            else:
                text = self.content
            if not isinstance(text, str):
                raise Unreadable(f"text expected, not {type(text).__name__}")
            text.encode("utf-8")  # JSON can spell half a surrogate pair, which no tokenizer takes
        except UnicodeError as error:
            raise Unreadable(f"not valid UTF-8 ({error.reason}, position {error.start})") from error
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
        return text


def _file_text(path: Path) -> str:
    content = read(path)
    if content.startswith(POINTER):
        raise Unreadable("a Git LFS pointer, its content was not fetched")
    return content.decode("utf-8-sig")


def _json_text(line: bytes, key: str) -> object:
    line = line.decode("utf-8-sig").strip()
    if not line:
        return ""
    try:
        record = untrusted_json.parse(line, Any, only=key)
    except untrusted_json.InvalidJson as error:
        raise Unreadable(str(error)) from error
    if not isinstance(record, dict):
        raise Unreadable(f"no key {key!r}: the line holds no object", f"no key {key!r}")
    if key not in record:
        there = ", ".join(list(record)[:KEYS_SHOWN]) + ", ..." * (len(record) > KEYS_SHOWN)
        raise Unreadable(f"no key {key!r}; there is {there or 'none'}", f"no key {key!r}")
    return record[key]


@dataclass
class Items:
    """A block of items that were made one by one."""

    items: list[Item]

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


def in_blocks(items: Iterable[Item]) -> Iterator[Items]:
    block = []
    size = 0
    for item in items:
        block.append(item)
        size += len(item.content) if isinstance(item.content, (str, bytes)) else item.size
        if len(block) >= BLOCK_ITEMS or size >= BLOCK_BYTES:
            yield Items(block)
            block = []
            size = 0
    if block:
        yield Items(block)
