"""Sources of documents: a text file, a .jsonl, a directory, or a Hugging Face dataset.

Rule: a source streams unread documents in a fixed order, in blocks; the workers read files and
parse JSON.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mixtrain.data.directory import saved_by_datasets, walk, without
from mixtrain.data.documents import Document, DocumentBlock, in_blocks
from mixtrain.data.formats import (
    detect_format,
    detect_in_directory,
    format_of,
    matching,
    of_format,
)
from mixtrain.data.hf_dataset import error_message, load_rows
from mixtrain.data.json_lines import JsonLines, LineBlock
from mixtrain.errors import UserError


@dataclass
class Files:
    """Files of one document each, in the given order, named relative to the root."""

    root: Path
    names: list[str]
    unit: ClassVar[str] = "bytes"

    def documents(self) -> Iterator[Document]:
        for name in self.names:
            path = Path(self.root) / name
            yield Document(name, path, size=path.stat().st_size if path.exists() else 0)

    def blocks(self) -> Iterator[DocumentBlock]:
        return in_blocks(self.documents())

    def total(self) -> int:
        return sum(document.size for document in self.documents())


@dataclass
class Rows:
    """The rows of a Hugging Face dataset: one document per row, from one column."""

    dataset: object
    column: str
    name: str = ""
    length: int | None = None  # None: unknown
    unit: ClassVar[str] = "rows"

    def documents(self) -> Iterator[Document]:
        rows = iter(self.dataset)
        number = 0
        while True:
            try:
                row = next(rows, None)
            # the library raises a dozen types, with no base class of its own
            except Exception as error:
                raise UserError(
                    f"{self.name}: `datasets` cannot read row {number}: {error_message(error)}"
                ) from error
            if row is None:
                return
            yield Document(f"row {number}", row[self.column])
            number += 1

    def blocks(self) -> Iterator[DocumentBlock]:
        return in_blocks(self.documents())

    def total(self) -> int | None:
        return len(self.dataset) if hasattr(self.dataset, "__len__") else self.length


@dataclass
class Several:
    """The documents of several sources, one source after the other."""

    sources: list
    unit: ClassVar[str] = "bytes"

    def documents(self) -> Iterator[Document]:
        for source in self.sources:
            yield from source.documents()

    def blocks(self) -> Iterator[DocumentBlock | LineBlock]:
        for source in self.sources:
            yield from source.blocks()

    def total(self) -> int:
        return sum(source.total() for source in self.sources)


def open_source(
    name: str, input_format: str = "auto", *, json_key: str | None = None,
    suffixes: tuple[str, ...] = (), exclude: tuple[str, ...] = (), split: str | None = None,
    column: str | None = None, subset: str | None = None,
):  # fmt: skip
    """Return the source for a name or a pattern in a format. UserError if it cannot be read."""
    path = Path(name)
    row_options = {"split": split, "column": column, "subset": subset}
    if path.is_dir():
        source_format, names = _files_to_read(path, input_format, suffixes, exclude)
        is_detected_jsonl = source_format == "jsonl" and input_format == "auto" and not json_key
        if is_detected_jsonl and any(row_options.values()):
            source_format = "datasets"  # `datasets` reads these files too
    else:
        source_format = detect_format(name) if input_format == "auto" else input_format
        names = []
    file_options = {"suffix": suffixes, "exclude": exclude}
    _refuse_unused_options(name, source_format, json_key, file_options, row_options)
    if source_format == "datasets":
        files = [f"{name}/{file}" for file in names] if suffixes else matching(name)
        not_excluded = set(names) if exclude and not suffixes else None
        rows, length = load_rows(name, split, column or "text", subset, files, not_excluded)
        return Rows(rows, column or "text", name, length)
    if path.is_dir():
        by_suffix = bool(suffixes) and input_format == "auto"
        return _directory_source(path, names, source_format, json_key or "text", by_suffix)
    files = matching(name)
    if files and source_format == "directory":
        raise UserError(
            f"{name} is a pattern of files; leave --input-format directory out, or give a directory"
        )
    if not files and not path.exists():
        raise UserError(f"{name}: no such file or directory")
    if source_format == "directory":
        raise UserError(f"{path} is not a directory")
    if source_format == "jsonl":
        sources = [JsonLines(Path(file), json_key or "text") for file in files or [name]]
        return sources[0] if len(sources) == 1 else Several(sources)
    return Files(Path(), files) if files else Files(path.parent, [path.name])


def _files_to_read(
    path: Path, input_format: str, suffixes: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[str, list[str]]:
    """Return (format of a directory, its files in reading order)."""
    if input_format == "auto":
        return detect_in_directory(path, suffixes, exclude)
    if input_format == "text":
        raise UserError(f"{path} is a directory; use --input-format directory or datasets")
    if input_format == "datasets" and saved_by_datasets(path):
        return input_format, []
    names = without(path, walk(path, suffixes), exclude)
    if input_format == "jsonl" and not suffixes:
        names = of_format(path, names, input_format)
    return input_format, names


def _directory_source(
    root: Path, names: list[str], source_format: str, json_key: str, by_suffix: bool
) -> Files | Several:
    """Return the files of a directory as one source; `by_suffix`: each in its suffix's format."""
    if source_format == "directory":
        return Files(root, names)
    sources: list[Files | JsonLines] = []
    for name in names:
        is_text = by_suffix and format_of(name) != "jsonl"
        sources.append(Files(root, [name]) if is_text else JsonLines(root / name, json_key, name))
    return Several(sources)


def _refuse_unused_options(
    name: str, source_format: str, json_key: str | None, file_options: dict, row_options: dict
) -> None:
    """Raise UserError for an option that the format does not use."""
    is_saved = Path(name).is_dir() and saved_by_datasets(Path(name))
    for option in [option for option, value in file_options.items() if value]:
        if is_saved or not Path(name).is_dir():
            raise UserError(
                f"{name} is read as {source_format}, and --{option} chooses among the files of a"
                " directory; leave it out"
            )
    if json_key is not None and source_format != "jsonl":
        hint = f"type --column {json_key}" if source_format == "datasets" else "leave it out"
        raise UserError(
            f"{name} is read as {source_format}, and --json-key is for .jsonl files; {hint}"
        )
    given = [option for option, value in row_options.items() if value is not None]
    if given and source_format != "datasets":
        hint = "type --input-format datasets" if source_format == "jsonl" else "leave it out"
        if given == ["column"] and source_format == "jsonl":
            hint = f"type --json-key {row_options['column']}"
        raise UserError(
            f"{name} is read as {source_format}, and --{given[0]} is for the rows of a data set;"
            f" {hint}"
        )
