"""Detect damage to a checkpoint with a manifest of file sizes and SHA-256 digests. No torch.

It does not protect against an attacker: whoever can write the files can write the manifest.
(Nothing read from a checkpoint is executed: safe.py.)
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
TENSORS = ".distcp"  # suffix of the large files
BLOCK = 1 << 24  # bytes


FileName = Annotated[
    Name, Check("the name of a file beside it", lambda name: os.path.basename(name) == name != "")
]
Sha256 = Annotated[
    str, Check("a SHA-256 in hexadecimal", lambda text: re.fullmatch("[0-9a-f]{64}", text))
]


class ManifestEntry(TypedDict):
    """One file in integrity.json."""

    size: Count  # bytes
    sha256: Sha256


class Manifest(TypedDict):
    """integrity.json."""

    files: dict[FileName, ManifestEntry]


class File(NamedTuple):
    """The size and digest of a file."""

    size: int  # bytes
    sha256: str


def write_manifest(directory: Path, files: dict[str, File]) -> None:
    """Write the manifest, the last file of a checkpoint: without it a checkpoint is not valid."""
    entries = {name: file._asdict() for name, file in sorted(files.items())}
    with open(directory / MANIFEST, "w") as stream:
        json.dump({"format": 1, "files": entries}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(directory: Path) -> dict[str, File]:
    """Return the files in the manifest of a checkpoint. ValueError if it is missing or damaged."""
    entries = untrusted_json.read(directory / MANIFEST, Manifest, most=LARGE)["files"]
    if not entries:
        raise ValueError(f"{directory / MANIFEST} is damaged: it lists no file")
    return {name: File(entry["size"], entry["sha256"]) for name, entry in entries.items()}


def problem(
    directory: Path,
    full: bool,
    rank: int = 0,
    world_size: int = 1,
    heartbeat: Callable[[], None] = lambda: None,
    only: Callable[[str], bool] = lambda name: True,
) -> str:
    """Return what is wrong with a checkpoint, naming the file; "" if nothing is.

    Large files are checked by size, or with `full` by SHA-256; small files always by SHA-256.
    `rank` checks its share of the files. `only` selects files by name. `heartbeat` is called after
    each block.
    """
    try:
        files = read_manifest(directory)
    except ValueError as error:
        return str(error)
    by_size = sorted(files.items(), key=lambda item: -item[1].size)
    for name, file in by_size[rank::world_size]:
        if only(name) and (wrong := _file_problem(directory / name, file, full, heartbeat)):
            return wrong
    return ""


def _file_problem(
    path: Path, expected: File, full: bool, heartbeat: Callable[[], None]
) -> str | None:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # reading a pipe would block, and a device has no end
            return f"{path} is not a file"
        if info.st_size != expected.size:
            return f"{path} has {info.st_size:,} bytes, not the {expected.size:,} that were written"
        if (full or path.suffix != TENSORS) and sha256(path, heartbeat) != expected.sha256:
            return f"{path} is damaged: its SHA-256 is not that of what was written"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def describe(paths: Iterable[Path]) -> dict[str, File]:
    """Return manifest entries for files, by reading them."""
    return {path.name: File(path.stat().st_size, sha256(path)) for path in paths}


def sha256(path: Path, heartbeat: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            heartbeat()
    return digest.hexdigest()
