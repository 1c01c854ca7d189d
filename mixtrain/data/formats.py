"""What a name given as input is read as: by its suffix, and a directory by what lies in it.

The rule it keeps: a suffix means in a directory what it means for a file, and no file is read as
what it may not be, or left out, unless the user has said so.
"""

import glob
import re
from pathlib import Path

from mixtrain.data.compressed import COMPRESSED
from mixtrain.data.directory import has_card, lies_beside, saved_by_datasets, walk, without
from mixtrain.errors import UserError

FORMATS = ("auto", "text", "jsonl", "directory", "datasets")
# fmt: off
FORMAT_OF_SUFFIX = {
    ".jsonl":   "jsonl",    ".ndjson": "jsonl",
    ".txt":     "text",     ".text":   "text",     ".md":    "text",     ".rst": "text",     ".py": "text",
    ".parquet": "datasets", ".arrow":  "datasets", ".json":  "datasets", ".csv": "datasets", ".tsv": "datasets",
}
# fmt: on
TABLES = (".parquet", ".arrow")  # no text is in these, and they are never compressed as a whole
# names by which `datasets` tells that not all of the files are for training
OTHER_SPLIT = re.compile(
    r"(^|[-._/ \d])(validation|valid|dev|val|test|testing|eval|evaluation)([-._/ \d]|$)"
)


def suffix_of(name: str) -> str:
    """The suffix that says what is in a file: .jsonl of a.jsonl.gz."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def format_of(name: str) -> str | None:
    """What a file is read as, by its name; None where that says nothing."""
    suffix = suffix_of(name)
    if suffix in TABLES and Path(name.lower()).suffix != suffix:
        return None
    return FORMAT_OF_SUFFIX.get(suffix)


def matching(name: str) -> list[str]:
    """The files that a pattern such as data/*.parquet stands for, in order of their names; none if it is no pattern."""
    if not glob.has_magic(name) or Path(name).exists():
        return []
    found = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
    if not found:
        raise UserError(f"{name}: no file fits this pattern")
    return found


def detect_format(name: str) -> str:
    """What `auto` means for what is no directory: a file by its suffix, and any other name a data set."""
    # a pipe is no file, but can be read
    files = matching(name) or ([name] if Path(name).exists() else [])
    kinds = {format_of(file): file for file in files}
    if None in kinds:
        file = kinds[None]
        known = (
            f"{' '.join(FORMAT_OF_SUFFIX)}, or one of text with {' '.join(COMPRESSED)} behind it"
        )
        raise UserError(
            f"{file}: no format goes with the suffix {Path(file).suffix!r} ({known}); give"
            " --input-format"
        )
    if len(kinds) > 1:
        raise UserError(
            f"{name}: {' and '.join(kinds.values())} are not of one format; give a narrower pattern"
        )
    if kinds:
        return next(iter(kinds))
    if format_of(name) or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file or directory")
    return "datasets"


def detect_in_directory(
    path: Path, suffixes: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[str, list[str]]:
    """(what `auto` means for a directory, the files to read in order of their names).

    A mixture, of which some file would be read as what it may not be, or not at all, is a
    UserError.
    """
    if saved_by_datasets(path):
        return "datasets", []
    names = without(path, walk(path, suffixes), exclude)
    if suffixes:
        return _chosen(path, names), names
    data = [name for name in names if not lies_beside(name)]
    kinds = {format_of(name): name for name in reversed(data)}  # and the first file of each
    records = kinds.keys() & {"jsonl", "datasets"}
    unknown = [name for name in data if not format_of(name)]
    out = f"*{Path(unknown[0]).suffix or Path(unknown[0]).name}" if unknown else "*.md"
    say = (
        f"say what to read: --suffix .txt, --exclude '{out}', a pattern as in '{path}/**/*.jsonl',"
        " or --input-format directory, which takes all of it for text"
    )
    if has_card(path) and not records:
        raise UserError(
            f"{path}/README.md describes a data set, and there is no file of records; {say}"
        )
    if not data:
        raise UserError(
            f"{path}: there is only {names[0]}, which lies beside data; give its path if it is the"
            " text"
        )
    if any(suffix_of(name) in TABLES for name in data if format_of(name)) or (
        records and has_card(path)
    ):
        return "datasets", names  # which sees to it that no file is left out
    if unknown:
        more = f" and {len(unknown) - 1:,} more" * (len(unknown) > 1)
        raise UserError(f"{path}/{unknown[0]}{more}: no suffix that says what it is; {say}")
    if records and "text" in kinds:
        record = kinds[min(records, key=lambda kind: kinds[kind])]
        raise UserError(f"{path}/{record} is no text, and {kinds['text']} beside it may be; {say}")
    if not records:
        return "directory", names
    alone = "datasets" not in kinds and not any(OTHER_SPLIT.search(name.lower()) for name in data)
    return ("jsonl", data) if alone else ("datasets", names)


def _chosen(path: Path, names: list[str]) -> str:
    """How files are read that the user has chosen by their suffix: each as its suffix says, text if it says nothing."""
    kinds = {format_of(name) or "text": name for name in reversed(names)}
    if "datasets" in kinds and len(kinds) > 1:
        raise UserError(
            f"{path}: {' and '.join(kinds.values())} are not of one kind; give fewer suffixes"
        )
    return "directory" if kinds.keys() == {"text"} else min(kinds)  # datasets or jsonl


def of_one_kind(path: Path, names: list[str], kind: str) -> list[str]:
    """The names without what lies beside data, of the kind that the user has given; no suffix may say another."""
    names = [name for name in names if not lies_beside(name)]
    others = [name for name in names if format_of(name) not in (kind, None)]
    if others:
        raise UserError(
            f"{path}/{others[0]} is no {kind} by its suffix; leave it out with --exclude"
            f" '*{Path(others[0]).suffix}'"
        )
    return names
