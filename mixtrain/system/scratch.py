"""Temporary folders, removed when their process ends or when the next process starts. No torch.

Rule: a process removes another process's folder only if it belongs to this user and host and its
lock is free, that is, its owner has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mixtrain.errors import UserError

PREFIX = "mixtrain-"
OWNER = "owner"  # a file in the folder: the host of its process, which holds a lock on the file


@contextlib.contextmanager
def folder(what: str = "") -> Iterator[str]:
    """Yield the path of a new folder, mode 0700, that exists for the block. Raises UserError."""
    path, owner = make(what)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(owner)


def make(what: str = "") -> tuple[str, int]:
    """Create such a folder, for the caller to remove: (path, lock descriptor). Raises UserError."""
    try:
        remove_left_behind()
        path = tempfile.mkdtemp(prefix=PREFIX + what)
        return path, _take_ownership(path)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; set TMPDIR to a folder that can be written"
        ) from None


def keep(path: str) -> None:
    """Exempt the folder from removal by later processes."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(path, OWNER))


def _take_ownership(path: str) -> int:
    """Create the owner file and return its lock; the file gets its name only after it is locked."""
    owner = os.path.join(path, OWNER)
    descriptor = os.open(owner + ".tmp", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # on a file system without locks, other processes cannot find the folder free either
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, socket.gethostname().encode())
        os.rename(owner + ".tmp", owner)
    except OSError as error:
        os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)
        raise OSError(error.errno, error.strerror, error.filename or path) from None
    return descriptor


def remove_left_behind() -> list[str]:
    """Remove the folders of killed processes; return their paths."""
    removed = []
    for entry in os.scandir(tempfile.gettempdir()):
        if not entry.name.startswith(PREFIX):
            continue
        with contextlib.suppress(OSError):  # the folder has just gone, or is another user's
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            if entry.is_dir(follow_symlinks=False) and _remove_if_free(entry.path):
                removed.append(entry.path)
    return removed


def _remove_if_free(path: str) -> bool:
    owner = Path(path, OWNER)
    descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(descriptor, 1000).decode(errors="replace") != socket.gethostname():
            return False  # locks of another host may be invisible here
        shutil.rmtree(path)
        return True
    finally:
        os.close(descriptor)
