"""Output that has no name before it is whole: who writes it, and what is said when the disk ends it. No torch.

Rule: what a killed process leaves is called NAME.writing, which no reader takes for the result and the next process
that writes NAME removes; never what a living one writes, which holds a lock on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mixtrain.errors import UserError
from mixtrain.system.status import DISK_FULL

_held: set[int] = set()  # the locks of this process
# a child would keep them
os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _ in list(_held)])


def make(writing: Path) -> list[Path]:
    """Make the directory; it and its parents, as far as they were made. UserError if it cannot be made."""
    made = [path for path in (writing, *writing.parents) if not path.exists()]
    try:
        writing.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{writing} cannot be made ({error.strerror})") from None
    return made


@contextlib.contextmanager
def claimed(directory: Path, what: str) -> Iterator[None]:
    """Hold a directory alone, as long as this process lives. It is the user's alone: who can open it can hold it."""
    descriptor = os.open(directory, os.O_RDONLY)
    _held.add(descriptor)
    try:
        with contextlib.suppress(PermissionError):  # a file system without modes
            os.fchmod(descriptor, 0o700)
        with contextlib.suppress(OSError):  # a file system without locks
            _lock(descriptor, directory, what)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, directory: Path, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{directory} is being written by another {what}") from None


def clear(writing: Path, written: set[str]) -> None:
    """Remove what a killed process has left, by its names. UserError if there is something that none of ours writes."""
    for path in sorted(writing.iterdir()):
        if path.name not in written:
            raise UserError(
                f"{path} is no file of an interrupted run; move it away, or give another name for"
                " the output"
            )
    for path in writing.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove(made: list[Path]) -> None:
    """Remove the directory that was written to, and those that were made for it."""
    shutil.rmtree(made[0], ignore_errors=True)
    for path in made[1:]:
        with contextlib.suppress(OSError):  # somebody else has put something there
            path.rmdir()


def free(path: Path) -> int:
    return shutil.disk_usage(path).free


def words(out: Path, writing: Path, error: OSError, takes: str = "") -> str:
    """What came of an output that the disk has ended: one line."""
    where = f"{error.filename}: " if error.filename else ""
    said = f"{out} is not made: {where}{error.strerror or error}"
    if error.errno not in DISK_FULL:
        return said
    written = sum(path.stat().st_size for path in writing.rglob("*") if path.is_file())
    takes, unit = (f"it takes {takes}; ", "") if takes else ("", " bytes")
    return f"{said}; {takes}{written:,}{unit} were written, and {free(writing):,} were free then"
