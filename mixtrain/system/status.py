"""status.json: the one file that whoever requeues a job, or looks in on it, needs to read. No torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import Count

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STATES = ("running", "finished", "stopped", "failed")


class Ending(TypedDict):
    """How a run has ended, as it said itself."""

    state: NotRequired[Literal[STATES] | None]
    reason: NotRequired[str | None]


class Status(TypedDict):
    """status.json."""

    state: Literal[STATES]
    step: Count
    max_steps: Count
    reason: str
    before: NotRequired[Ending | None]
    changed_mathematics: NotRequired[list[Any]]


def write_status(
    run_dir: str | Path, *, state: str, step: int, max_steps: int, reason: str, **more: object
) -> None:
    """Replace status.json whole: a reader never sees half of it. `more`: what else there is to say, by key."""
    assert state in STATES, state
    path = Path(run_dir) / "status.json"
    temporary = path.with_suffix(".json.tmp")
    text = (
        json.dumps({"state": state, "step": step, "max_steps": max_steps, "reason": reason, **more})
        + "\n"
    )
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno not in DISK_FULL or not _overwritten(path, text.encode()):
            raise


def _overwritten(path: Path, data: bytes) -> bool:
    """Whether the file took the bytes in its place, at most a block at once: a full disk has room for that."""
    try:
        with open(path, "r+b", buffering=0) as file:
            found = os.fstat(file.fileno())
            if len(data) > min(found.st_blocks * 512, 4096):
                return False
            return file.write(data.ljust(found.st_size)) >= len(data)
    except OSError:
        return False


def try_write_status(run_dir: str | Path, **status: object) -> OSError | None:
    """The same, for who has more to do than to write it: what went wrong, or None."""
    try:
        write_status(run_dir, **status)
    except OSError as error:
        return error
    return None


def read_status(run_dir: str | Path) -> dict | None:
    """The status of a run, or None if it has written none yet (the file is there, but empty, while it is claimed).

    InvalidJson if it is damaged.
    """
    path = Path(run_dir) / "status.json"
    return untrusted_json.read(path, Status) if path.exists() and path.stat().st_size else None
