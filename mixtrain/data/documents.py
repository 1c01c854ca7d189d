"""Unread documents, and blocks of them: what a source hands to the worker processes.

Rule: a document without text raises UnreadableDocument, which says why.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtrain.data.compressed import read_file
from mixtrain.data.directory import POINTER
from mixtrain.system import untrusted_json

# limits of a block (but a single document may be larger)
BLOCK_DOCUMENTS = 256
BLOCK_BYTES = 1 << 20
KEYS_SHOWN = 8  # of a JSON line that lacks the requested key


class UnreadableDocument(Exception):
    """A document without text, and why. The reader of the source counts and reports it.

    `group`: a reason that many documents of a source may share; it is reported only once.
    """

    def __init__(self, why: str, group: str = ""):
        super().__init__(why)
        self.group = group


@dataclass
class Document:
    """An unread document: its name, and a path, a raw JSON line (with its key) or a row's value."""

    name: str
    content: object
    json_key: str | None = None
    size: int = 1  # in the unit of its source, for the progress display

    def text(self) -> str:
        """Return the document's text. Raises UnreadableDocument if it has none."""
        try:
            if self.json_key is not None:
                text = _json_text(self.content, self.json_key)
            elif isinstance(self.content, Path):
                text = _file_text(self.content)
            # a parquet column of bytes without the text annotation
            elif isinstance(self.content, bytes):
                text = self.content.decode("utf-8-sig")
            else:
                text = self.content
            if not isinstance(text, str):
                raise UnreadableDocument(f"text expected, not {type(text).__name__}")
            text.encode("utf-8")  # JSON can spell a lone surrogate, which no tokenizer accepts
        except UnicodeError as error:
            raise UnreadableDocument(
                f"not valid UTF-8 ({error.reason}, position {error.start})"
            ) from error
        except OSError as error:
            raise UnreadableDocument(error.strerror or str(error)) from error
        return text


def _file_text(path: Path) -> str:
    content = read_file(path)
    if content.startswith(POINTER):
        raise UnreadableDocument("a Git LFS pointer, its content was not fetched")
    return content.decode("utf-8-sig")


def _json_text(line: bytes, key: str) -> object:
    line = line.decode("utf-8-sig").strip()
    if not line:
        return ""
    try:
        record = untrusted_json.parse(line, Any, only=key)
    except untrusted_json.InvalidJson as error:
        raise UnreadableDocument(str(error)) from error
    if not isinstance(record, dict):
        raise UnreadableDocument(f"no key {key!r}: the line holds no object", f"no key {key!r}")
    if key not in record:
        keys = ", ".join(list(record)[:KEYS_SHOWN]) + ", ..." * (len(record) > KEYS_SHOWN)
        raise UnreadableDocument(f"no key {key!r}; there is {keys or 'none'}", f"no key {key!r}")
    return record[key]


@dataclass
class DocumentBlock:
    """A block of documents that a source made one by one."""

    documents: list[Document]

    @property
    def size(self) -> int:
        return sum(document.size for document in self.documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)


def in_blocks(documents: Iterable[Document]) -> Iterator[DocumentBlock]:
    block = []
    size = 0
    for document in documents:
        block.append(document)
        content = document.content
        size += len(content) if isinstance(content, (str, bytes)) else document.size
        if len(block) >= BLOCK_DOCUMENTS or size >= BLOCK_BYTES:
            yield DocumentBlock(block)
            block = []
            size = 0
    if block:
        yield DocumentBlock(block)
