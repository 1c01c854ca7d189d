"""Where documents come from: a text file, a .jsonl, a directory, or a Hugging Face data set.

The rule it keeps: a source streams small items in one fixed order and leaves to the workers what they can read
themselves, and an item that gives no text says why, under its name.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mixtrain import untrusted_json
from mixtrain.data.directory import PACKED, POINTER, RECORDS, TABLES, has_card, lies_beside, saved_by_datasets, walk
from mixtrain.data.rows import load_rows, reason
from mixtrain.errors import UserError

FORMATS = ("auto", "text", "jsonl", "directory", "datasets")
# fmt: off
FORMAT_OF_SUFFIX = {
    ".jsonl":   "jsonl",    ".ndjson": "jsonl",
    ".txt":     "text",     ".text":   "text",     ".md":    "text",     ".rst": "text",     ".py": "text",
    ".parquet": "datasets", ".arrow":  "datasets", ".json":  "datasets", ".csv": "datasets",
}
# fmt: on


class Unreadable(Exception):
    """An item that holds no text, and why: counted and named by whoever reads the source."""


@dataclass
class Item:
    """One document yet to be read: its name, and its path, its raw JSON line or its text."""

    name: str
    content: object
    json_key: str | None = None
    size: int = 1  # in the unit of its source, for the progress display

    def text(self) -> str:
        """The document's text. Raises Unreadable with the reason where there is none."""
        try:
            if isinstance(self.content, Path):
                content = self.content.read_bytes()
                if content.startswith(POINTER):
                    raise Unreadable("a Git LFS pointer, its content was not fetched")
                text = content.decode("utf-8-sig")
            elif isinstance(self.content, bytes):
                text = _json_text(self.content, self.json_key)
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


def _json_text(line: bytes, key: str) -> object:
    line = line.decode("utf-8-sig").strip()
    if not line:
        return ""
    try:
        record = untrusted_json.parse(line, Any, only=key)
    except untrusted_json.InvalidJson as error:
        raise Unreadable(str(error)) from error
    if not isinstance(record, dict) or key not in record:
        raise Unreadable(f"no key {key!r}")
    return record[key]


@dataclass
class Files:
    """Files read as one document each, in the order given, named relative to the root."""

    root: Path
    names: list[str]
    unit: ClassVar[str] = "bytes"

    def items(self) -> Iterator[Item]:
        for name in self.names:
            path = Path(self.root) / name
            yield Item(name, path, size=path.stat().st_size if path.exists() else 0)

    def total(self) -> int:
        return sum(item.size for item in self.items())


@dataclass
class JsonLines:
    """One document a line, under one key."""

    path: Path
    json_key: str
    unit: ClassVar[str] = "bytes"

    def items(self) -> Iterator[Item]:
        with open(self.path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield Item(f"{self.path.name} line {number}", line, self.json_key, len(line))

    def total(self) -> int:
        return self.path.stat().st_size


@dataclass
class Rows:
    """The rows of a Hugging Face data set, one document each, from one column."""

    dataset: object
    column: str
    name: str = ""
    length: int | None = None  # where it is known
    unit: ClassVar[str] = "rows"

    def items(self) -> Iterator[Item]:
        rows, number = iter(self.dataset), 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # the library raises a dozen types, with no base class of its own
                raise UserError(f"{self.name}: `datasets` cannot read row {number}: {reason(error)}") from error
            if row is None:
                return
            yield Item(f"row {number}", row[self.column])
            number += 1

    def total(self) -> int | None:
        return len(self.dataset) if hasattr(self.dataset, "__len__") else self.length


@dataclass
class Several:
    """The items of several sources, one source after the other."""

    sources: list
    unit: ClassVar[str] = "bytes"

    def items(self) -> Iterator[Item]:
        for source in self.sources:
            yield from source.items()

    def total(self) -> int:
        return sum(source.total() for source in self.sources)


def open_source(
    name: str, input_format: str = "auto", *, json_key: str = "text", suffixes: tuple[str, ...] = (),
    split: str | None = None, column: str = "text", subset: str | None = None,
):  # fmt: skip
    """The source meant by a name or a pattern, and a format. Raises UserError where nothing can be read there."""
    path, files = Path(name), matching(name)
    kind = detect_format(name, suffixes) if input_format == "auto" else input_format
    _refuse_idle(name, kind, json_key, suffixes, {"split": split, "column": column, "subset": subset})
    if kind == "datasets":
        rows, length = load_rows(name, split, column, subset, files)
        return Rows(rows, column, name, length)
    if files:
        if kind == "directory":
            raise UserError(f"{name} is a pattern of files; leave --input-format directory out, or give a directory")
        sources = [JsonLines(Path(file), json_key) for file in files]
        return Several(sources) if kind == "jsonl" else Files(Path(), files)
    if not path.exists():
        raise UserError(f"{name}: no such file or directory")
    if kind == "directory":
        return Files(path, walk(path, suffixes))
    if path.is_dir():
        raise UserError(f"{name} is a directory; use --input-format directory or datasets")
    return JsonLines(path, json_key) if kind == "jsonl" else Files(path.parent, [path.name])


def _refuse_idle(name: str, kind: str, json_key: str, suffixes: tuple[str, ...], of_rows: dict) -> None:
    """An option that the format does not read was meant for something."""
    if suffixes and kind != "directory":
        raise UserError(f"{name} is read as {kind}, and --suffix chooses among the files of a directory; leave it out")
    if json_key != "text" and kind != "jsonl":
        hint = f"; type --column {json_key}" if kind == "datasets" else "; leave it out"
        raise UserError(f"{name} is read as {kind}, and --json-key is for .jsonl files{hint}")
    given = [option for option, value in of_rows.items() if value not in (None, "text")]
    if given and kind != "datasets":
        hint = "--input-format datasets" if kind == "jsonl" else "or leave it out"
        raise UserError(f"{name} is read as {kind}, and --{given[0]} is for the rows of a data set; type {hint}")


def detect_format(name: str, suffixes: tuple[str, ...] = ()) -> str:
    """What `auto` means: a file by its suffix, a directory by what lies in it, and any other name a data set."""
    path = Path(name)
    if path.is_dir():
        return _format_of_directory(path, suffixes)
    files = matching(name) or ([name] if path.is_file() else [])
    kinds = {FORMAT_OF_SUFFIX.get(Path(file).suffix.lower()): file for file in files}
    if None in kinds:
        known = " ".join(FORMAT_OF_SUFFIX)
        file = kinds[None]
        raise UserError(f"{file}: no format goes with the suffix {Path(file).suffix!r} ({known}); give --input-format")
    if len(kinds) > 1:
        raise UserError(f"{name}: {' and '.join(kinds.values())} are not of one format; give a narrower pattern")
    if kinds:
        return next(iter(kinds))
    if path.suffix.lower() in FORMAT_OF_SUFFIX or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file or directory")
    return "datasets"


def _format_of_directory(path: Path, suffixes: tuple[str, ...]) -> str:
    """A data set of `datasets`, or a directory of text; a mixture, of which either leaves a part out, is refused."""
    if saved_by_datasets(path):
        return "datasets"
    names = walk(path, suffixes)
    records = [name for name in names if Path(name).suffix.lower() in (*RECORDS, *PACKED) and not lies_beside(name)]
    others = [name for name in names if name not in set(records) and not lies_beside(name)]
    say = f"say what to read: --suffix of the text, a pattern as in '{path}/**/*.jsonl', or --input-format directory"
    if suffixes:
        if records:
            raise UserError(f"{path}/{records[0]} is a file of records, and --suffix is for files of text; {say}")
        return "directory"
    if has_card(path) and not records:
        raise UserError(f"{path}/README.md describes a data set, and there is no file of records; {say}")
    if any(name.lower().endswith(TABLES) for name in records) or (records and (has_card(path) or not others)):
        return "datasets"
    if records:
        raise UserError(f"{path}/{records[0]} is no text, and {others[0]} beside it may be; {say}")
    return "directory"


def matching(name: str) -> list[str]:
    """The files that a pattern such as data/*.parquet stands for, in order of their names; none if it is no pattern."""
    if not glob.has_magic(name) or Path(name).exists():
        return []
    found = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
    if not found:
        raise UserError(f"{name}: no file fits this pattern")
    return found
