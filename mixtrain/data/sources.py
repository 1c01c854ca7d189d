"""Where documents come from: a text file, a .jsonl, a directory, or a Hugging Face data set.

The rule it keeps: a source streams small items in one fixed order, in blocks, and leaves to the
workers what they can read themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mixtrain.data.directory import saved_by_datasets, walk, without
from mixtrain.data.formats import (
    detect_format,
    detect_in_directory,
    format_of,
    matching,
    of_one_kind,
)
from mixtrain.data.items import Item, Items, in_blocks
from mixtrain.data.lines import JsonLines, Lines
from mixtrain.data.rows import load_rows, reason
from mixtrain.errors import UserError


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

    def blocks(self) -> Iterator[Items]:
        return in_blocks(self.items())

    def total(self) -> int:
        return sum(item.size for item in self.items())


@dataclass
class Rows:
    """The rows of a Hugging Face data set, one document each, from one column."""

    dataset: object
    column: str
    name: str = ""
    length: int | None = None  # where it is known
    unit: ClassVar[str] = "rows"

    def items(self) -> Iterator[Item]:
        rows = iter(self.dataset)
        number = 0
        while True:
            try:
                row = next(rows, None)
            # the library raises a dozen types, with no base class of its own
            except Exception as error:
                raise UserError(
                    f"{self.name}: `datasets` cannot read row {number}: {reason(error)}"
                ) from error
            if row is None:
                return
            yield Item(f"row {number}", row[self.column])
            number += 1

    def blocks(self) -> Iterator[Items]:
        return in_blocks(self.items())

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

    def blocks(self) -> Iterator[Items | Lines]:
        for source in self.sources:
            yield from source.blocks()

    def total(self) -> int:
        return sum(source.total() for source in self.sources)


def open_source(
    name: str, input_format: str = "auto", *, json_key: str | None = None, suffixes: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (), split: str | None = None, column: str | None = None, subset: str | None = None,
):  # fmt: skip
    """The source meant by a name or a pattern, and a format. Raises UserError where nothing can be read there."""
    path = Path(name)
    of_rows = {"split": split, "column": column, "subset": subset}
    if path.is_dir():
        kind, names = _in_directory(path, input_format, suffixes, exclude)
        if kind == "jsonl" and input_format == "auto" and not json_key and any(of_rows.values()):
            kind = "datasets"  # which reads these files as well
    else:
        kind = detect_format(name) if input_format == "auto" else input_format
        names = []
    _refuse_idle(name, kind, json_key, {"suffix": suffixes, "exclude": exclude}, of_rows)
    if kind == "datasets":
        chosen = [f"{name}/{file}" for file in names] if suffixes else matching(name)
        left = set(names) if exclude and not suffixes else None
        rows, length = load_rows(name, split, column or "text", subset, chosen, left)
        return Rows(rows, column or "text", name, length)
    if path.is_dir():
        return _files(
            path, names, kind, json_key or "text", bool(suffixes) and input_format == "auto"
        )
    files = matching(name)
    if files and kind == "directory":
        raise UserError(
            f"{name} is a pattern of files; leave --input-format directory out, or give a directory"
        )
    if not files and not path.exists():
        raise UserError(f"{name}: no such file or directory")
    if kind == "directory":
        raise UserError(f"{path} is not a directory")
    if kind == "jsonl":
        sources = [JsonLines(Path(file), json_key or "text") for file in files or [name]]
        return sources[0] if len(sources) == 1 else Several(sources)
    return Files(Path(), files) if files else Files(path.parent, [path.name])


def _in_directory(
    path: Path, kind: str, suffixes: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[str, list[str]]:
    """(how a directory is read, the files of it that are read in this order)."""
    if kind == "auto":
        return detect_in_directory(path, suffixes, exclude)
    if kind == "text":
        raise UserError(f"{path} is a directory; use --input-format directory or datasets")
    if kind == "datasets" and saved_by_datasets(path):
        return kind, []
    names = without(path, walk(path, suffixes), exclude)
    return kind, of_one_kind(path, names, kind) if kind == "jsonl" and not suffixes else names


def _files(
    root: Path, names: list[str], kind: str, json_key: str, by_suffix: bool
) -> Files | Several:
    """Files of a directory as one source: all of one kind, or each as its suffix says."""
    if kind == "directory":
        return Files(root, names)
    of_text = [by_suffix and format_of(name) != "jsonl" for name in names]
    return Several(
        [
            Files(root, [name]) if is_text else JsonLines(root / name, json_key, name)
            for name, is_text in zip(names, of_text, strict=True)
        ]
    )


def _refuse_idle(
    name: str, kind: str, json_key: str | None, of_directories: dict, of_rows: dict
) -> None:
    """An option that the format does not read was meant for something."""
    saved = Path(name).is_dir() and saved_by_datasets(Path(name))
    for option in [option for option, value in of_directories.items() if value]:
        if saved or not Path(name).is_dir():
            raise UserError(
                f"{name} is read as {kind}, and --{option} chooses among the files of a directory;"
                " leave it out"
            )
    if json_key is not None and kind != "jsonl":
        hint = f"; type --column {json_key}" if kind == "datasets" else "; leave it out"
        raise UserError(f"{name} is read as {kind}, and --json-key is for .jsonl files{hint}")
    given = [option for option, value in of_rows.items() if value is not None]
    if given and kind != "datasets":
        hint = "--input-format datasets" if kind == "jsonl" else "or leave it out"
        if given == ["column"] and kind == "jsonl":
            hint = f"--json-key {of_rows['column']}"
        raise UserError(
            f"{name} is read as {kind}, and --{given[0]} is for the rows of a data set; type {hint}"
        )
