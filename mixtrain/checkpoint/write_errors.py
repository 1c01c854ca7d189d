"""The message after a write error: which checkpoint is complete, which command resumes. No torch.

Rule: nothing here writes, or raises because of what is on the disk.
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
# errors of the machine, whatever the file
MACHINE = (*DISK_FULL, errno.EROFS, errno.EIO, errno.ESTALE)


class Unwritable(Fault):
    """A file of the run could not be written."""

    def __init__(self, path: str | Path, error: OSError):
        super().__init__(f"{path} cannot be written ({error.strerror})")
        self.errno = error.errno


@contextlib.contextmanager
def convert_write_errors(path: str | Path) -> Iterator[None]:
    """Convert an OSError of the block, which writes `path`, to Unwritable with the file's name."""
    try:
        yield
    except OSError as error:
        raise Unwritable(error.filename or path, error) from None


def is_write_error(plan: Plan, error: BaseException) -> bool:
    """Return whether this is an error of the machine's storage, or concerns a file of the run."""
    if not isinstance(error, OSError):
        return False
    run_dir = os.path.join(plan.config.run_dir, "")
    return error.errno in MACHINE or str(error.filename or "").startswith(run_dir)


def recovery_advice(plan: Plan, number: int | None) -> str:
    """Return which checkpoint is complete, and what to type after the error with this errno."""
    run_dir = plan.config.run_dir
    if not os.path.isdir(run_dir):
        return (
            f"{run_dir} is gone, with every checkpoint in it; the same command starts from step 0"
        )
    never = plan.config.checkpoint.resume is Resume.never
    command = f"run the same command {'with checkpoint.resume=auto' if never else 'again'}"
    checkpoint = newest_complete(run_dir)
    if checkpoint is None:
        return f"there is no complete checkpoint: {_remedy(number)}{command} to start from step 0"
    return f"{checkpoint.name} is complete: {_remedy(number)}{command} to resume from it"


def _remedy(number: int | None) -> str:
    if number == errno.EFBIG:
        return "raise the limit of a file's size (ulimit -f) and "
    if number in DISK_FULL:
        return "free some space and "
    return "make it writable and " if number in READ_ONLY else ""


def newest_complete(run_dir: str) -> Path | None:
    """Return the newest checkpoint whose files have the sizes that were written."""
    with contextlib.suppress(OSError):
        for step in steps_in(run_dir):
            if not integrity.problem(path_of(run_dir, step), full=False):
                return path_of(run_dir, step)
    return None
