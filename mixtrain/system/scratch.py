"""Folders under the temporary directory that go with their process, or when the next one starts. No torch.

Rule: a folder is removed for another process only if that one, of this user on this host, has ended: its lock is free.
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
OWNER = "owner"  # in the folder: names the host of its process, which holds a lock on it


@contextlib.contextmanager
def folder(what: str = "") -> Iterator[str]:
    """A new folder of this process, mode 0700, for the block. UserError if there can be none."""
    path, owner = make(what)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(owner)


def make(what: str = "") -> tuple[str, int]:
    """The same for a caller that removes it: (its path, the lock, which ends with this process). UserError as above."""
    try:
        remove_left_behind()
        path = tempfile.mkdtemp(prefix=PREFIX + what)
        return path, _own(path)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; set TMPDIR to a folder that can be written"
        ) from None


def keep(path: str) -> None:
    """Nobody removes the folder from now on."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(path, OWNER))


def _own(path: str) -> int:
    """Leave the owner's file in the folder. It gets its name when it is locked, so that nobody finds it free before."""
    owner = os.path.join(path, OWNER)
    descriptor = os.open(owner + ".tmp", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with contextlib.suppress(OSError):  # without locks nobody else takes it for free either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, socket.gethostname().encode())
        os.rename(owner + ".tmp", owner)
    except OSError as error:
        os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)
        raise OSError(error.errno, error.strerror, error.filename or path) from None
    return descriptor


def remove_left_behind() -> list[str]:
    """Remove the folders of processes that were killed; their paths."""
    removed = []
    for entry in os.scandir(tempfile.gettempdir()):
        with contextlib.suppress(OSError):  # it has just gone, or it is somebody else's
            mine = (
                entry.name.startswith(PREFIX)
                and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
            )
            if mine and entry.is_dir(follow_symlinks=False) and _remove_if_free(entry.path):
                removed.append(entry.path)
    return removed


def _remove_if_free(path: str) -> bool:
    owner = Path(path, OWNER)
    descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(descriptor, 1000).decode(errors="replace") != socket.gethostname():
            return False  # another host's locks may not be seen here
        shutil.rmtree(path)
        return True
    finally:
        os.close(descriptor)
