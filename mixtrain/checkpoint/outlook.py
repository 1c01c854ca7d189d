"""What is said where something could not be written: which checkpoint is whole, and what to type. No torch.

Rule: nothing here needs to write, or raises because of what it finds.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mixtrain.checkpoint import integrity
from mixtrain.checkpoint.directory import path_of, steps_in
from mixtrain.config.choices import Resume
from mixtrain.config.plan import Plan
from mixtrain.errors import Fault
from mixtrain.system.status import DISK_FULL

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# whatever the file is, no fault of ours
MACHINE = (*DISK_FULL, errno.EROFS, errno.EIO, errno.ESTALE)


class Unwritable(Fault):
    """A file of the run could not be written."""

    def __init__(self, path: str | Path, error: OSError):
        super().__init__(f"{path} cannot be written ({error.strerror})")
        self.errno = error.errno


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within the block `path` is written: Unwritable, with the file's name, if that fails."""
    try:
        yield
    except OSError as error:
        raise Unwritable(error.filename or path, error) from None


def explains_itself(plan: Plan, error: BaseException) -> bool:
    """An error of the file system: by its kind, or because it is about a file of the run."""
    if not isinstance(error, OSError):
        return False
    return error.errno in MACHINE or str(error.filename or "").startswith(
        os.path.join(plan.config.run_dir, "")
    )


def outlook(plan: Plan, number: int | None) -> str:
    """After an error `number` of the file system: which checkpoint of the run is whole, and what to type."""
    run_dir = plan.config.run_dir
    if not os.path.isdir(run_dir):
        return f"{run_dir} is gone, with every checkpoint in it; the same command begins anew"
    again = (
        "with checkpoint.resume=auto" if plan.config.checkpoint.resume is Resume.never else "again"
    )
    typed = f"{_cure(number)}type the same command {again}"
    whole = newest_whole(run_dir)
    if whole is None:
        return f"there is no whole checkpoint: {typed}, and it begins anew"
    return f"{whole.name} is whole: {typed}, and it goes on from there"


def _cure(number: int | None) -> str:
    if number == errno.EFBIG:
        return "raise the limit of a file's size (ulimit -f) and "
    return (
        "free some space and "
        if number in DISK_FULL
        else "make it writable and "
        if number in READ_ONLY
        else ""
    )


def newest_whole(run_dir: str) -> Path | None:
    """The newest checkpoint whose files have the sizes that were written."""
    with contextlib.suppress(OSError):
        for step in steps_in(run_dir):
            if not integrity.problem(path_of(run_dir, step), full=False):
                return path_of(run_dir, step)
    return None
