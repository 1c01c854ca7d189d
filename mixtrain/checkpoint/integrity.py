"""Whether a checkpoint on disk is the one that was written: a manifest of sizes and SHA-256. No torch.

It protects against damage, not against an attacker: who can write the files can write the manifest. (What is read is
never run: safe.py.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import LARGE, Check, Count, Name

MANIFEST = "integrity.json"
TENSORS = ".distcp"  # what the names of large files end with
BLOCK = 1 << 24  # bytes


FileName = Annotated[
    Name, Check("the name of a file beside it", lambda name: os.path.basename(name) == name != "")
]
Sha256 = Annotated[
    str, Check("a SHA-256 in hexadecimal", lambda text: re.fullmatch("[0-9a-f]{64}", text))
]


class Entry(TypedDict):
    """What the manifest holds of a file."""

    size: Count
    sha256: Sha256


class Manifest(TypedDict):
    """integrity.json."""

    files: dict[FileName, Entry]


class File(NamedTuple):
    """What the manifest says of a file."""

    size: int  # bytes
    sha256: str


def write_manifest(directory: Path, files: dict[str, File]) -> None:
    """Write the manifest, the last file of a checkpoint: without it there is none."""
    entries = {name: file._asdict() for name, file in sorted(files.items())}
    with open(directory / MANIFEST, "w") as stream:
        json.dump({"format": 1, "files": entries}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(directory: Path) -> dict[str, File]:
    """The manifest of a checkpoint. ValueError with what is wrong with it."""
    entries = untrusted_json.read(directory / MANIFEST, Manifest, most=LARGE)["files"]
    if not entries:
        raise ValueError(f"{directory / MANIFEST} is damaged: it lists no file")
    return {name: File(entry["size"], entry["sha256"]) for name, entry in entries.items()}


def problem(
    directory: Path,
    full: bool,
    part: int = 0,
    of: int = 1,
    heartbeat: Callable[[], None] = lambda: None,
    only: Callable[[str], bool] = lambda name: True,
) -> str:
    """What is wrong with a checkpoint, naming the file; "" if nothing is. `part` of `of` looks at a share of the files.

    Those that hold tensors by size, or by what is in them (`full`), the small ones always by what is in them. Of those
    alone whose names `only` takes. `beat` is called after each block.
    """
    try:
        files = read_manifest(directory)
    except ValueError as error:
        return str(error)
    for name, file in sorted(files.items(), key=lambda item: -item[1].size)[part::of]:
        if only(name) and (wrong := _file_problem(directory / name, file, full, heartbeat)):
            return wrong
    return ""


def _file_problem(
    path: Path, expected: File, full: bool, heartbeat: Callable[[], None]
) -> str | None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device has no end
            return f"{path} is no file"
        if found.st_size != expected.size:
            return (
                f"{path} has {found.st_size:,} bytes, not the {expected.size:,} that were written"
            )
        if (full or path.suffix != TENSORS) and sha256(path, heartbeat) != expected.sha256:
            return f"{path} is damaged: its SHA-256 is not that of what was written"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def describe(paths: Iterable[Path]) -> dict[str, File]:
    """The manifest's entries of files, by reading them."""
    return {path.name: File(path.stat().st_size, sha256(path)) for path in paths}


def sha256(path: Path, heartbeat: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            heartbeat()
    return digest.hexdigest()
