"""Files of JSON lines, compressed or not: one document a line, handed to the workers in blocks of raw bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mixtrain.data.compressed import BEGINS, pieces
from mixtrain.data.directory import POINTER
from mixtrain.data.items import Item
from mixtrain.errors import UserError

# bytes of a block, about: enough to keep a worker busy for longer than it takes to hand it over
BLOCK = 1 << 18


@dataclass
class Lines:
    """A block of whole lines, as they are in the file."""

    name: str  # of the file
    first: int  # number of the first line
    data: bytes
    json_key: str
    size: int  # bytes of the file that it took

    def __iter__(self) -> Iterator[Item]:
        lines = self.data.split(b"\n")
        if not lines[-1]:
            lines.pop()  # behind the last line's end
        for number, line in enumerate(lines, start=self.first):
            yield Item(f"{self.name} line {number}", line, self.json_key, len(line) + 1)


@dataclass
class JsonLines:
    """One document a line, under one key."""

    path: Path
    json_key: str
    name: str = ""  # of the file where several are read; its own
    unit: ClassVar[str] = "bytes"

    def items(self) -> Iterator[Item]:
        for block in self.blocks():
            yield from block

    def blocks(self) -> Iterator[Lines]:
        """Raises UserError where the file cannot be read, or is no file of JSON lines."""
        # `rest` is the beginning of a line, in pieces
        rest = []
        number = 1
        size = 0
        try:
            for piece, taken in pieces(self.path, BLOCK):
                if number == 1 and not rest:
                    self._refuse(piece)
                size += taken
                end = piece.rfind(b"\n") + 1
                if not end:
                    rest.append(piece)
                    continue
                lines = Lines(
                    self._name, number, b"".join([*rest, piece[:end]]), self.json_key, size
                )
                yield lines
                rest = [piece[end:]] if piece[end:] else []
                size = 0
                number = number + lines.data.count(b"\n")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from error
        if rest:
            yield Lines(self._name, number, b"".join(rest), self.json_key, size)

    def total(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def _name(self) -> str:
        return self.name or self.path.name

    def _refuse(self, beginning: bytes) -> None:
        """What the first bytes show to be another kind of file."""
        if beginning.startswith(POINTER):
            raise UserError(
                f"{self.path}: a Git LFS pointer, its content was not fetched; type git lfs pull"
                " there"
            )
        for begins, suffix in BEGINS.items():
            if beginning.startswith(begins):
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
