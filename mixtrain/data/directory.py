"""What lies in a directory that is to be read: files of text or of records, and what stands beside them."""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from mixtrain.errors import UserError

# how the file begins that Git LFS puts in the place of another
POINTER = b"version https://git-lfs.github.com/spec/"
# what save_to_disk leaves in a directory
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")
# what lies beside the data of a repository and is none
BESIDE = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|contributing)[\w-]*(\.(md|txt|rst|cff|bib))?",
    re.I,
)
INFOS = "dataset_infos.json"  # what `datasets` once kept beside them
CARD = re.compile(
    r"^(configs|dataset_info|task_categories|task_ids|size_categories|annotations_creators):",
    re.MULTILINE,
)


def walk(root: Path, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Files below the root in order of their names; hidden ones and __pycache__ are left out: nobody wrote those."""

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
        raise UserError(
            f"{root}: no file{' that ends in ' + ' or '.join(suffixes) if suffixes else ''} there"
        )
    return sorted(names)


def without(root: Path, names: list[str], patterns: Iterable[str]) -> list[str]:
    """The names that fit none of the patterns, whole or by their last part. UserError for a pattern that none fits."""
    for pattern in patterns:
        left = [
            name
            for name in names
            if not fnmatch(name, pattern) and not fnmatch(Path(name).name, pattern)
        ]
        if len(left) == len(names):
            raise UserError(f"{root}: no file there fits --exclude {pattern}; leave it out")
        names = left
    if not names:
        raise UserError(f"{root}: --exclude {' '.join(patterns)} leaves no file")
    return names


def is_pointer(path: Path) -> bool:
    """The file is a Git LFS pointer; no file of that name is none."""
    try:
        with open(path, "rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def saved_by_datasets(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED_BY_DATASETS)


def lies_beside(name: str) -> bool:
    """A file that no repository means as data: README.md, LICENSE, dataset_infos.json."""
    return Path(name).name == INFOS or bool(BESIDE.fullmatch(Path(name).name))


def has_card(root: Path) -> bool:
    """The directory is a data set's repository: its README.md begins with what the hub reads of one."""
    if (root / INFOS).is_file():
        return True
    try:
        text = (root / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.startswith("---\n") and bool(CARD.search(text[4:].split("\n---")[0]))
