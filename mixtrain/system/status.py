"""Read and write status.json, the one file that requeueing and monitoring a run need. No torch."""

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
    """How a run ended, by its own account."""

    state: NotRequired[Literal[STATES] | None]
    reason: NotRequired[str | None]


class Status(TypedDict):
    state: Literal[STATES]
    step: Count
    max_steps: Count
    reason: str
    before: NotRequired[Ending | None]
    changed_mathematics: NotRequired[list[Any]]


def write_status(
    run_dir: str | Path, *, state: str, step: int, max_steps: int, reason: str, **more: object
) -> None:
    """Replace status.json atomically; `more` has further keys. Raises OSError."""
    assert state in STATES, state
    path = Path(run_dir) / "status.json"
    temporary = path.with_suffix(".json.tmp")
    status = {"state": state, "step": step, "max_steps": max_steps, "reason": reason, **more}
    text = json.dumps(status) + "\n"
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno not in DISK_FULL or not _overwrite(path, text.encode()):
            raise


def _overwrite(path: Path, data: bytes) -> bool:
    """Overwrite the file in place, at most one block, which a full disk allows; True on success."""
    try:
        with open(path, "r+b", buffering=0) as file:
            status = os.fstat(file.fileno())
            if len(data) > min(status.st_blocks * 512, 4096):
                return False
            return file.write(data.ljust(status.st_size)) >= len(data)
    except OSError:
        return False


def try_write_status(run_dir: str | Path, **status: object) -> OSError | None:
    """Write status.json; return the error instead of raising it, or None."""
    try:
        write_status(run_dir, **status)
    except OSError as error:
        return error
    return None


def read_status(run_dir: str | Path) -> dict | None:
    """Return the status of a run; None if the file does not exist or is empty (claimed, no status).

    Raises InvalidJson if the file is damaged.
    """
    path = Path(run_dir) / "status.json"
    return untrusted_json.read(path, Status) if path.exists() and path.stat().st_size else None
