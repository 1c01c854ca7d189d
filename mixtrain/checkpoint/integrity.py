"""Whether a checkpoint on disk is the one that was written: a manifest of sizes and SHA-256. No torch.

It protects against damage, not against an attacker: who can write the files can write the manifest. (What is read is
never run: safe.py.)
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

MANIFEST = "integrity.json"
TENSORS = ".distcp"  # what the names of large files end with
BLOCK = 1 << 24  # bytes


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
    try:
        entries = json.loads((directory / MANIFEST).read_bytes())["files"]
        files = {name: File(int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        raise ValueError(f"{directory / MANIFEST} is missing") from None
    except OSError as error:
        raise ValueError(f"{directory / MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{directory / MANIFEST} is damaged: it is not a list of files") from None
    if not files or any(os.path.basename(name) != name for name in files):
        raise ValueError(f"{directory / MANIFEST} is damaged: it does not list the files of its directory")
    return files


def problem(
    directory: Path,
    full: bool,
    part: int = 0,
    of: int = 1,
    beat: Callable[[], None] = lambda: None,
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
        if only(name) and (wrong := _file_problem(directory / name, file, full, beat)):
            return wrong
    return ""


def _file_problem(path: Path, expected: File, full: bool, beat: Callable[[], None]) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device has no end
            return f"{path} is no file"
        if found.st_size != expected.size:
            return f"{path} has {found.st_size:,} bytes, not the {expected.size:,} that were written"
        if (full or path.suffix != TENSORS) and sha256(path, beat) != expected.sha256:
            return f"{path} is damaged: its SHA-256 is not that of what was written"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return ""


def describe(paths: Iterable[Path]) -> dict[str, File]:
    """The manifest's entries of files, by reading them."""
    return {path.name: File(path.stat().st_size, sha256(path)) for path in paths}


def sha256(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            beat()
    return digest.hexdigest()
