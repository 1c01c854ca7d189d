"""Lists the files of an input directory, and recognises files beside the data (README, LICENSE)."""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from mixtrain.errors import UserError

# first bytes of the pointer file that Git LFS leaves in place of a file that was not fetched
POINTER = b"version https://git-lfs.github.com/spec/"
# files that datasets.save_to_disk writes
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")
# files of a repository that are not data
NOT_DATA = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|contributing)[\w-]*(\.(md|txt|rst|cff|bib))?",
    re.I,
)
INFOS = "dataset_infos.json"  # written beside the data by older versions of `datasets`
DATASET_CARD = re.compile(
    r"^(configs|dataset_info|task_categories|task_ids|size_categories|annotations_creators):",
    re.MULTILINE,
)


def walk(root: Path, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Return the files below the root, sorted by name, without hidden files and __pycache__."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    if not root.is_dir():
        raise UserError(f"{root} is not a directory")
    names = []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name != "__pycache__"
        ]
        for name in files:
            if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                names.append((Path(folder) / name).relative_to(root).as_posix())
    if not names:
        ending = " that ends in " + " or ".join(suffixes) if suffixes else ""
        raise UserError(f"{root}: no file{ending} there")
    return sorted(names)


def without(root: Path, names: list[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that match no pattern, neither as a path nor by their last component.

    Raises UserError for a pattern that matches no name.
    """
    for pattern in patterns:
        remaining = [
            name
            for name in names
            if not fnmatch(name, pattern) and not fnmatch(Path(name).name, pattern)
        ]
        if len(remaining) == len(names):
            raise UserError(f"{root}: no file there matches --exclude {pattern}; leave it out")
        names = remaining
    if not names:
        raise UserError(f"{root}: --exclude {' '.join(patterns)} leaves no file")
    return names


def is_pointer(path: Path) -> bool:
    """Return whether the file is a Git LFS pointer; False if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def saved_by_datasets(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED_BY_DATASETS)


def is_not_data(name: str) -> bool:
    """Return whether a file of a repository is not data: README.md, LICENSE, dataset_infos.json."""
    return Path(name).name == INFOS or bool(NOT_DATA.fullmatch(Path(name).name))


def has_dataset_card(root: Path) -> bool:
    """Return whether the README.md begins with a dataset's metadata, as in a Hub repository."""
    if (root / INFOS).is_file():
        return True
    try:
        text = (root / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.startswith("---\n") and bool(DATASET_CARD.search(text[4:].split("\n---")[0]))
