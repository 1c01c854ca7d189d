"""Files that a process holds a lock on, and who does. No torch.

Rule: whoever can open such a file can hold it, so it is its user's alone (mode 0600); and what a
holder has written into it is not proof of who holds it.
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
    """The descriptor of a lock file, made if there is none, that nobody but this user can open from now on.

    OSError with what is wrong, in plain words where the file is another user's or no file of its own.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except PermissionError as error:
        raise PermissionError(error.errno, _why(path) or error.strerror, str(path)) from None
    except OSError as error:
        why = "it is a link, not a file of its own" if os.path.islink(path) else error.strerror
        raise OSError(error.errno, why, str(path)) from None
    found = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "it is not a file", str(path))
        if found.st_mode & 0o077:  # of an earlier version
            os.fchmod(descriptor, 0o600)
    except PermissionError as error:
        if found.st_uid != os.geteuid():  # else its file system has no modes
            os.close(descriptor)
            raise PermissionError(error.errno, _why(path) or error.strerror, str(path)) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _why(path: str | os.PathLike) -> str:
    """That another user's process may hold the lock, where that is why it cannot be opened."""
    try:
        owner = os.stat(path, follow_symlinks=False).st_uid
    except OSError:
        return ""  # there is none, and none may be made
    if owner == os.geteuid():
        return ""
    name = str(owner)
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(owner).pw_name
    return f"it is user {name}'s, who alone can say whether it is in use; if it is not, remove it"


def sign(descriptor: int) -> None:
    """Write into the lock file who holds it. OSError if that cannot be written."""
    os.ftruncate(descriptor, 0)
    os.pwrite(
        descriptor, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode(), 0
    )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def holder(descriptor: int) -> str:
    """Who holds the lock of an open file, for a sentence: what is known, and what is not.

    What the file says counts if that process has the lock indeed, which this host's /proc shows.
    """
    text = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
    record = RECORD.fullmatch(text)
    here = _holders(descriptor)
    if record and int(record[1]) in here and record[2] == socket.gethostname():
        return text
    said = f"the last one that signed it: {text}" if record else "nobody has signed it"
    if here:
        return f"process {here[0]} on {socket.gethostname()} ({said})"
    return f"a process that cannot be seen from {socket.gethostname()} ({said})"


def _holders(descriptor: int) -> list[int]:
    """The processes of this host that have the lock on an open file, as far as this user may see them."""
    mine = os.fstat(descriptor)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            for entry in os.scandir(process / "fd"):
                same = os.path.samestat(os.stat(entry.path), mine)
                if same and "FLOCK" in (process / "fdinfo" / entry.name).read_text():
                    found.append(int(process.name))
    return sorted(found)
