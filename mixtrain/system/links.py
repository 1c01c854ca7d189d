"""Resolve and copy files of an untrusted directory without leaving it through links. No torch.

Rule: only files of the directory are copied. A link may point into the directory or to blobs/ of
the Hugging Face cache: with tokenizer.json -> /etc/shadow, an export would publish that file.
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
    """Return the regular file `name` of a directory, links resolved; None if the name is free.

    Raises UserError if it is not a regular file, or a link that leads out of the directory.
    """
    path = directory / name
    try:
        if not os.path.lexists(path):
            return None
        real = path.resolve(strict=True)
        kind = stat.S_IFMT(real.lstat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        if path.is_symlink():
            reason = f"is a link to {os.readlink(path)}, which is not a file"
        else:
            reason = f"cannot be read ({error})"
        raise UserError(f"{path} {reason}") from None
    if not any(real.is_relative_to(root) for root in _allowed_roots(directory)):
        raise UserError(
            f"{path} is a link that leads out of its directory, to {real}; put a copy of that there"
        )
    if kind != stat.S_IFREG:
        raise UserError(f"{path} is {KINDS.get(kind, 'something else')}; a file was expected")
    return real


def _allowed_roots(directory: Path) -> Iterator[Path]:
    """Yield the directory and, in the Hugging Face cache, the blobs/ beside its snapshots/."""
    real = directory.resolve()
    yield real
    for parent in real.parents:
        if parent.name == "snapshots":
            yield parent.with_name("blobs")


def directory_in(directory: Path, name: str) -> Path | None:
    """Return the subdirectory `name`, or None. Raises UserError if a link leads outside."""
    path = directory / name
    if not path.is_dir():
        return None
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in _allowed_roots(directory)):
        raise UserError(
            f"{path} is a link that leads out of its directory, to {real}; put a copy of that"
            " directory there"
        )
    return path


def copy(source: Path, target: Path) -> None:
    """Copy a file that `file_in` returned; replace `target` atomically, also where it is a link."""
    partial = target.with_name(target.name + ".tmp")
    partial.unlink(missing_ok=True)
    with open(source, "rb", opener=_open_no_link) as original, open(partial, "xb") as new:
        shutil.copyfileobj(original, new)
    os.replace(partial, target)


def _open_no_link(path: str, flags: int) -> int:
    # the file may have become a link or a pipe since it was checked
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
