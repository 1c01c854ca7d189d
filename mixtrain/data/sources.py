"""Where documents come from: a text file, a .jsonl, a directory, or a Hugging Face data set.

The rule it keeps: a source streams small items in one fixed order and leaves to the workers what they can read
themselves, and an item that gives no text says why, under its name.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mixtrain import untrusted_json
from mixtrain.errors import UserError

FORMATS = ("auto", "text", "jsonl", "directory", "datasets")
# fmt: off
FORMAT_OF_SUFFIX = {
    ".jsonl":   "jsonl",    ".ndjson": "jsonl",
    ".txt":     "text",     ".text":   "text",     ".md":    "text",     ".rst": "text",     ".py": "text",
    ".parquet": "datasets", ".arrow":  "datasets", ".json":  "datasets", ".csv": "datasets",
}
# fmt: on
BUILDER_OF_SUFFIX = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves in a directory


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
                text = self.content.read_bytes().decode("utf-8-sig")
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
    unit: ClassVar[str] = "rows"

    def items(self) -> Iterator[Item]:
        for number, row in enumerate(self.dataset):
            yield Item(f"row {number}", row[self.column])

    def total(self) -> int | None:
        return len(self.dataset) if hasattr(self.dataset, "__len__") else None  # a stream does not know


def open_source(
    name: str, input_format: str = "auto", *, json_key: str = "text", suffixes: tuple[str, ...] = (),
    split: str = "train", column: str = "text",
):  # fmt: skip
    """The source meant by a name and a format. Raises UserError where nothing can be read under that name."""
    path = Path(name)
    kind = detect_format(name) if input_format == "auto" else input_format
    if suffixes and kind != "directory":
        raise UserError(f"{name} is read as {kind}, and --suffix chooses among the files of a directory; leave it out")
    if kind == "datasets":
        return Rows(_load_rows(name, split, column), column)
    if not path.exists():
        raise UserError(f"{name}: no such file or directory")
    if kind == "directory":
        return Files(path, _walk(path, suffixes))
    if path.is_dir():
        raise UserError(f"{name} is a directory; use --input-format directory or datasets")
    return JsonLines(path, json_key) if kind == "jsonl" else Files(path.parent, [path.name])


def detect_format(name: str) -> str:
    """What `auto` means: a file by its suffix, a directory by what lies in it, and any other name a data set."""
    path = Path(name)
    kind = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if path.is_dir():
        tables = any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))
        return "datasets" if tables or _saved_by_datasets(path) else "directory"
    if path.is_file():
        if kind is None:
            known = " ".join(FORMAT_OF_SUFFIX)
            raise UserError(f"{path}: no format goes with the suffix {path.suffix!r} ({known}); give --input-format")
        return kind
    if kind is not None or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file or directory")
    return "datasets"


def _saved_by_datasets(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED_BY_DATASETS)


def _walk(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Files below the root in order of their names; hidden ones and __pycache__ are left out: nobody wrote those."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    if not root.is_dir():
        raise UserError(f"{root} is not a directory")
    names = []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__pycache__"]
        for name in files:
            if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                names.append((Path(folder) / name).relative_to(root).as_posix())
    if not names:
        raise UserError(f"{root}: no file{' that ends in ' + ' or '.join(suffixes) if suffixes else ''} there")
    return sorted(names)


def _load_rows(name: str, split: str, column: str):
    """A Hugging Face data set with one column, streamed where it would be copied into a cache first."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: to read it, install the package `datasets`") from error
    path, builder = Path(name), BUILDER_OF_SUFFIX.get(Path(name).suffix.lower())
    if path.is_file() and builder is None:
        raise UserError(f"{name}: as a file of a data set it must end in {' or '.join(BUILDER_OF_SUFFIX)}")
    try:
        if _saved_by_datasets(path):
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        elif path.is_file():
            rows = datasets.load_dataset(builder, data_files={split: name}, split=split, streaming=True)
        else:
            rows = datasets.load_dataset(name, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # the library raises a dozen types, with no base class of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        missing = "" if path.exists() else "no such path, and "
        raise UserError(f"{name}: {missing}`datasets` cannot load the split {split!r} of it: {reason}") from error
    if column not in columns:
        raise UserError(f"{name}: no column {column!r} in split {split!r}; there is {', '.join(columns) or 'no row'}")
    return rows.select_columns([column])
