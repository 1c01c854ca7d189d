"""Detects the input format: of a file by its suffix, of a directory by the files in it.

Rule: a suffix has the same meaning in a directory as for a single file. Without an explicit option
no file is read in a format that it may not have, and none is left out.
"""

import glob
import re
from pathlib import Path

from mixtrain.data.compressed import COMPRESSED
from mixtrain.data.directory import has_dataset_card, is_not_data, saved_by_datasets, walk, without
from mixtrain.errors import UserError

FORMATS = ("auto", "text", "jsonl", "directory", "datasets")
# fmt: off
FORMAT_OF_SUFFIX = {
    ".jsonl":   "jsonl",    ".ndjson": "jsonl",
    ".txt":     "text",     ".text":   "text",
    ".md":      "text",     ".rst":    "text",     ".py":   "text",
    ".parquet": "datasets", ".arrow":  "datasets",
    ".json":    "datasets", ".csv":    "datasets", ".tsv":  "datasets",
}
# fmt: on
TABLES = (".parquet", ".arrow")  # binary tables: never text, and never compressed as a whole
# file names that `datasets` assigns to a split other than train
OTHER_SPLIT = re.compile(
    r"(^|[-._/ \d])(validation|valid|dev|val|test|testing|eval|evaluation)([-._/ \d]|$)"
)


def suffix_of(name: str) -> str:
    """Return the suffix without that of the compression: .jsonl of a.jsonl.gz."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def format_of(name: str) -> str | None:
    """Return the format of a file by its name; None for an unknown suffix."""
    suffix = suffix_of(name)
    if suffix in TABLES and Path(name.lower()).suffix != suffix:
        return None
    return FORMAT_OF_SUFFIX.get(suffix)


def matching(name: str) -> list[str]:
    """Return the files that match a pattern such as data/*.parquet, sorted; [] for a plain name."""
    if not glob.has_magic(name) or Path(name).exists():
        return []
    files = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
    if not files:
        raise UserError(f"{name}: no file matches this pattern")
    return files


def detect_format(name: str) -> str:
    """Return the format that `auto` means for anything but a directory.

    A file's format follows from its suffix; a name that is no file is a dataset of the Hub.
    """
    # exists(), not is_file(): a pipe can be read too
    files = matching(name) or ([name] if Path(name).exists() else [])
    file_of_format = {format_of(file): file for file in files}
    if None in file_of_format:
        file = file_of_format[None]
        known = f"{' '.join(FORMAT_OF_SUFFIX)}, or one of text followed by {' '.join(COMPRESSED)}"
        raise UserError(
            f"{file}: no format goes with the suffix {Path(file).suffix!r} ({known}); give"
            " --input-format"
        )
    if len(file_of_format) > 1:
        raise UserError(
            f"{name}: {' and '.join(file_of_format.values())} are not of one format; give a"
            " narrower pattern"
        )
    if file_of_format:
        return next(iter(file_of_format))
    if format_of(name) or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file or directory")
    return "datasets"


def detect_in_directory(
    path: Path, suffixes: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[str, list[str]]:
    """Return (the format that `auto` means for a directory, the files to read, sorted by name).

    Raises UserError for a mixture in which a file would be left out, or read in a format that it
    may not have.
    """
    if saved_by_datasets(path):
        return "datasets", []
    names = without(path, walk(path, suffixes), exclude)
    if suffixes:
        return _format_of_suffixes(path, names), names
    data = [name for name in names if not is_not_data(name)]
    first_file = {format_of(name): name for name in reversed(data)}  # of each format
    record_formats = first_file.keys() & {"jsonl", "datasets"}
    unknown = [name for name in data if not format_of(name)]
    excluded = f"*{Path(unknown[0]).suffix or Path(unknown[0]).name}" if unknown else "*.md"
    options = (
        f"say what to read: --suffix .txt, --exclude '{excluded}', a pattern as in"
        f" '{path}/**/*.jsonl', or --input-format directory, which reads every file as text"
    )
    if has_dataset_card(path) and not record_formats:
        raise UserError(
            f"{path}/README.md describes a data set, and there is no file of records; {options}"
        )
    if not data:
        raise UserError(
            f"{path}: the only file is {names[0]}, which is not read as data; give its path if it"
            " is the text"
        )
    has_table = any(format_of(name) and suffix_of(name) in TABLES for name in data)
    if has_table or (record_formats and has_dataset_card(path)):
        return "datasets", names  # hf_dataset.py checks that no file is left out
    if unknown:
        more = f" and {len(unknown) - 1:,} more" * (len(unknown) > 1)
        raise UserError(f"{path}/{unknown[0]}{more}: the suffix names no format; {options}")
    if record_formats and "text" in first_file:
        record_file = min(first_file[name] for name in record_formats)
        raise UserError(
            f"{path}/{record_file} is not text, and {first_file['text']} beside it may be;"
            f" {options}"
        )
    if not record_formats:
        return "directory", names
    if "datasets" in first_file or any(OTHER_SPLIT.search(name.lower()) for name in data):
        return "datasets", names
    return "jsonl", data


def _format_of_suffixes(path: Path, names: list[str]) -> str:
    """Return the format of files chosen with --suffix; an unknown suffix means text."""
    first_file = {format_of(name) or "text": name for name in reversed(names)}
    if "datasets" in first_file and len(first_file) > 1:
        raise UserError(
            f"{path}: {' and '.join(first_file.values())} are not of one format; give fewer"
            " suffixes"
        )
    return "directory" if first_file.keys() == {"text"} else min(first_file)  # datasets or jsonl


def of_format(path: Path, names: list[str], input_format: str) -> list[str]:
    """Return the data files among the names. UserError if a suffix means another format."""
    names = [name for name in names if not is_not_data(name)]
    unexpected = [name for name in names if format_of(name) not in (input_format, None)]
    if unexpected:
        raise UserError(
            f"{path}/{unexpected[0]} is not {input_format} by its suffix; leave it out with"
            f" --exclude '*{Path(unexpected[0]).suffix}'"
        )
    return names
