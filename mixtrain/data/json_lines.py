"""Files of JSON lines, compressed or not: one document per line, in blocks of raw bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mixtrain.data.compressed import MAGIC_BYTES, read_chunks
from mixtrain.data.directory import POINTER
from mixtrain.data.documents import Document
from mixtrain.errors import UserError

# bytes of a block, about: tokenizing a block takes longer than handing it to a worker
BLOCK = 1 << 18


@dataclass
class LineBlock:
    """A block of complete lines, as raw bytes of the file."""

    name: str  # of the file
    first: int  # number of the first line
    data: bytes
    json_key: str
    size: int  # bytes read from the file for it

    def __iter__(self) -> Iterator[Document]:
        lines = self.data.split(b"\n")
        if not lines[-1]:
            lines.pop()  # after the last newline
        for number, line in enumerate(lines, start=self.first):
            yield Document(f"{self.name} line {number}", line, self.json_key, len(line) + 1)


@dataclass
class JsonLines:
    """A source of one document per line, under one key."""

    path: Path
    json_key: str
    name: str = ""  # shown instead of the file's name
    unit: ClassVar[str] = "bytes"

    def documents(self) -> Iterator[Document]:
        for block in self.blocks():
            yield from block

    def blocks(self) -> Iterator[LineBlock]:
        """Yield the file's lines. UserError if the file cannot be read or has no JSON lines."""
        unfinished_line = []  # chunks
        number = 1
        size = 0
        try:
            for chunk, bytes_read in read_chunks(self.path, BLOCK):
                if number == 1 and not unfinished_line:
                    self._check_beginning(chunk)
                size += bytes_read
                end = chunk.rfind(b"\n") + 1
                if not end:
                    unfinished_line.append(chunk)
                    continue
                data = b"".join([*unfinished_line, chunk[:end]])
                yield LineBlock(self._name, number, data, self.json_key, size)
                unfinished_line = [chunk[end:]] if chunk[end:] else []
                size = 0
                number += data.count(b"\n")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from error
        if unfinished_line:
            yield LineBlock(self._name, number, b"".join(unfinished_line), self.json_key, size)

    def total(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def _name(self) -> str:
        return self.name or self.path.name

    def _check_beginning(self, beginning: bytes) -> None:
        """Raise UserError if the first bytes are those of another kind of file."""
        if beginning.startswith(POINTER):
            raise UserError(
                f"{self.path}: a Git LFS pointer, its content was not fetched; type git lfs pull"
                " there"
            )
        for magic_bytes, suffix in MAGIC_BYTES.items():
            if beginning.startswith(magic_bytes):
                raise UserError(
                    f"{self.path} begins as a {suffix} file does; give it a name that ends in"
                    f" {suffix}"
                )
        if beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise UserError(
                f"{self.path} begins with a JSON array, and JSON lines are objects with the key"
                f" {self.json_key!r}; if the array holds the documents, type --input-format"
                " datasets"
            )
