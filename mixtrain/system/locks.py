"""Open lock files, and name the process that holds one. No torch.

Rule: a lock file has mode 0600, because everyone who can open it can hold the lock. The text in
the file does not prove who holds it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import socket
import stat
import time
from pathlib import Path

RECORD = re.compile(r"process (\d+) on ([\w.-]+) since [\d: -]+")


def open_lock(path: str | os.PathLike) -> int:
    """Open a lock file, creating it if needed, and make it accessible to this user only.

    Raises OSError; its text is a sentence for another user's file, a link, or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except PermissionError as error:
        raise PermissionError(error.errno, _owner(path) or error.strerror, str(path)) from None
    except OSError as error:
        reason = "it is a link, not a file of its own" if os.path.islink(path) else error.strerror
        raise OSError(error.errno, reason, str(path)) from None
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a file", str(path))
        if status.st_mode & 0o077:  # from an earlier version
            os.fchmod(descriptor, 0o600)
    except PermissionError as error:
        if status.st_uid != os.geteuid():  # otherwise the file system has no modes
            os.close(descriptor)
            raise PermissionError(error.errno, _owner(path) or error.strerror, str(path)) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _owner(path: str | os.PathLike) -> str:
    """Return a sentence about the other user who owns the lock file, or ""."""
    try:
        owner = os.stat(path, follow_symlinks=False).st_uid
    except OSError:
        return ""  # the file does not exist and cannot be created
    if owner == os.geteuid():
        return ""
    name = str(owner)
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(owner).pw_name
    return (
        f"it belongs to user {name}, who alone can tell whether it is in use; if it is not,"
        " remove it"
    )


def sign(descriptor: int) -> None:
    """Write this process, host and time into the lock file. Raises OSError."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    record = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, record.encode(), 0)


def holder(descriptor: int) -> str:
    """Return a noun phrase for the holder of the lock on an open file.

    The text in the file counts only if /proc of this host shows that this process has the lock.
    """
    text = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
    record = RECORD.fullmatch(text)
    holders = _local_holders(descriptor)
    host = socket.gethostname()
    if record and int(record[1]) in holders and record[2] == host:
        return text
    signature = f"the last one that signed it: {text}" if record else "nobody has signed it"
    if holders:
        return f"process {holders[0]} on {host} ({signature})"
    return f"a process that cannot be seen from {host} ({signature})"


def _local_holders(descriptor: int) -> list[int]:
    """Return the processes of this host, visible to this user, that hold the lock."""
    lock_file = os.fstat(descriptor)
    holders = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's process, or it has just ended
            for entry in os.scandir(process / "fd"):
                is_same = os.path.samestat(os.stat(entry.path), lock_file)
                if is_same and "FLOCK" in (process / "fdinfo" / entry.name).read_text():
                    holders.append(int(process.name))
    return sorted(holders)
