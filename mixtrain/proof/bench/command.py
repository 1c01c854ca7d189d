"""Variants that are a line of a shell: how long it takes, to its end or to a line that it prints. No torch.

In a line {python} is this Python, {shared} a folder that the row's lines share, {folder} an empty one for each turn.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtrain.errors import Fault

MINUTES = 30


@dataclass(frozen=True)
class Taken:
    """What a line took. CPU time and memory are those of all processes that it has waited for, to its end."""

    seconds: float  # to the end, or to the line
    cpu_seconds: float
    # resident, of the fullest process; null where it was less than this one's
    peak_bytes: int | None


def filled(line: str, shared: Path, folder: Path) -> str:
    for name, value in {"python": sys.executable, "shared": shared, "folder": folder}.items():
        line = line.replace(f"{{{name}}}", shlex.quote(str(value)))
    return line


def run(name: str, line: str, shared: Path, folder: Path, until: str | None, cwd: Path) -> Taken:
    """Run the line in an empty `folder`, until it ends or prints a line in which `until` is found."""
    folder.mkdir(parents=True)
    log = folder.parent / f"{folder.name}.log"
    os.sync()  # what was written before is not written now
    with log.open("w") as errors:
        began = time.perf_counter()
        child = subprocess.Popen(
            filled(line, shared, folder),
            shell=True,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        with _ended(child):
            seen, printed = _watched(child, until, began)
            _, status, usage = os.wait4(child.pid, 0)
            ended = time.perf_counter() - began
            child.returncode = code = os.waitstatus_to_exitcode(status)
    shutil.rmtree(folder)
    if code:
        raise Fault(f"{name}: exit code {code} of {line}\n{log.read_text()[-2000:]}")
    if until and seen is None:
        raise Fault(f"{name}: no line of its output matches {until}:\n{''.join(printed)[-2000:]}")
    return Taken(seen if until else ended, usage.ru_utime + usage.ru_stime, _peak(usage))


def _watched(
    child: subprocess.Popen, until: str | None, began: float
) -> tuple[float | None, list[str]]:
    """(when `until` was found, all lines), when the child's output has ended; after MINUTES it is killed."""
    seen = None
    printed = []
    patience = threading.Timer(60 * MINUTES, os.killpg, (child.pid, signal.SIGKILL))
    patience.daemon = True
    patience.start()
    try:
        for text in child.stdout:
            printed.append(text)
            if until and seen is None and re.search(until, text):
                seen = time.perf_counter() - began
    finally:
        patience.cancel()
    return seen, printed


@contextlib.contextmanager
def _ended(child: subprocess.Popen) -> Iterator[None]:
    """Within the block the child may run. Asked first: the ranks that a training starts are in groups of their own."""
    try:
        yield
    finally:
        child.stdout.close()
        for asked in (signal.SIGTERM, signal.SIGKILL):
            if child.returncode is None:
                os.killpg(child.pid, asked)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=20)


def _peak(usage: resource.struct_rusage) -> int | None:
    """Resident bytes at the most; null where that is no more than its parent's, with whose peak a child starts."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage.ru_maxrss * 1024 if usage.ru_maxrss > 1.2 * own else None
