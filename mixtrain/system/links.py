"""A file of a directory that somebody else may have made: which file it is before it is copied. No torch.

Rule: what is copied lies in its directory. A link may lead to another place there or to the blobs of the hub's cache,
and nowhere else: tokenizer.json -> /etc/shadow would be given away with the next export.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from mixtrain.errors import UserError

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def file_in(directory: Path, name: str) -> Path | None:
    """The regular file that `name` is in a directory, links followed; None if nothing has that name.

    UserError if it is something else, or a link that leads out of the directory.
    """
    path = directory / name
    try:
        if not os.path.lexists(path):
            return None
        real = path.resolve(strict=True)
        kind = stat.S_IFMT(real.lstat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        what = (
            f"is a link to {os.readlink(path)}, which is no file"
            if path.is_symlink()
            else f"cannot be read ({error})"
        )
        raise UserError(f"{path} {what}") from None
    if not any(real.is_relative_to(home) for home in _homes(directory)):
        raise UserError(
            f"{path} is a link that leads out of its directory, to {real}; put a copy of that there"
        )
    if kind != stat.S_IFREG:
        raise UserError(f"{path} is {KINDS.get(kind, 'something else')}; a file was expected")
    return real


def _homes(directory: Path) -> Iterator[Path]:
    """Where the files of a directory may lie: in it, or in blobs/ of the hub's cache, beside its snapshots/."""
    real = directory.resolve()
    yield real
    for parent in real.parents:
        if parent.name == "snapshots":
            yield parent.with_name("blobs")


def directory_in(directory: Path, name: str) -> Path | None:
    """The directory that `name` is in a directory; None if there is none. UserError if a link leads out of it."""
    path = directory / name
    if not path.is_dir():
        return None
    real = path.resolve()
    if not any(real.is_relative_to(home) for home in _homes(directory)):
        raise UserError(
            f"{path} is a link that leads out of its directory, to {real}; put a copy of that"
            " directory there"
        )
    return path


def copy(source: Path, target: Path) -> None:
    """Copy what `file_in` gave to `target`, in one step: a link that is there is replaced, not written through."""
    partial = target.with_name(target.name + ".tmp")
    partial.unlink(missing_ok=True)
    with open(source, "rb", opener=_no_link) as there, open(partial, "xb") as here:
        shutil.copyfileobj(there, here)
    os.replace(partial, target)


def _no_link(path: str, flags: int) -> int:
    # should it have become a link or a pipe by now
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
