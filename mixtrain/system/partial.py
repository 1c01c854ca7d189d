"""Output directories that get their final name only when they are complete. No torch.

Rule: unfinished output is in NAME.writing, which no reader accepts. The next process that writes
NAME removes what a killed one has left there, but nothing while a living one holds the lock.
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

_held: set[int] = set()  # descriptors of this process's locks
# a forked child would keep the locks
os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _ in list(_held)])


def make(writing: Path) -> list[Path]:
    """Create the directory; return it and the parents that were created. Raises UserError."""
    made = [path for path in (writing, *writing.parents) if not path.exists()]
    try:
        writing.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{writing} cannot be made ({error.strerror})") from None
    return made


@contextlib.contextmanager
def claim(directory: Path, what: str) -> Iterator[None]:
    """Lock a directory for the block; raise UserError if another process, a `what`, has the lock.

    The directory gets mode 0700, because everyone who can open it can hold the lock.
    """
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
    """Empty the directory; raise UserError if it has a name that is not in `written`."""
    for path in sorted(writing.iterdir()):
        if path.name not in written:
            raise UserError(
                f"{path} was not written by an interrupted run; move it away, or give another name"
                " for the output"
            )
    for path in writing.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove(made: list[Path]) -> None:
    """Remove the directory and the parents that `make` created for it."""
    shutil.rmtree(made[0], ignore_errors=True)
    for path in made[1:]:
        with contextlib.suppress(OSError):  # another process has put something there
            path.rmdir()


def free(path: Path) -> int:
    return shutil.disk_usage(path).free


def failure_message(out: Path, writing: Path, error: OSError, needed: str = "") -> str:
    """Return one line about a write error: the file, the reason, on a full disk the bytes."""
    where = f"{error.filename}: " if error.filename else ""
    message = f"{out} was not written: {where}{error.strerror or error}"
    if error.errno not in DISK_FULL:
        return message
    written = sum(path.stat().st_size for path in writing.rglob("*") if path.is_file())
    needed, unit = (f"it takes {needed}; ", "") if needed else ("", " bytes")
    return (
        f"{message}; {needed}{written:,}{unit} were written, and {free(writing):,} were free then"
    )
