"""Times variants that are shell commands, to their end or to a line that they print. No torch.

In a command {python} is this Python, {shared} a folder that the row's commands share, {folder} an
empty folder for each turn.
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

TIMEOUT_MINUTES = 30


@dataclass(frozen=True)
class CommandResult:
    """Time and memory of a command, to its end, with all child processes that it waited for."""

    seconds: float  # to the end, or to the line that matches `until`
    cpu_seconds: float
    # resident, of the largest process; None if it was less than this process's
    peak_bytes: int | None


def fill_placeholders(command: str, shared: Path, folder: Path) -> str:
    for name, value in {"python": sys.executable, "shared": shared, "folder": folder}.items():
        command = command.replace(f"{{{name}}}", shlex.quote(str(value)))
    return command


def run(
    name: str, command: str, shared: Path, folder: Path, until: str | None, cwd: Path
) -> CommandResult:
    """Run a command in an empty `folder`; time it to its end or to the first line with `until`."""
    folder.mkdir(parents=True)
    log = folder.parent / f"{folder.name}.log"
    os.sync()  # so that earlier writes do not slow this command down
    with log.open("w") as errors:
        began = time.perf_counter()
        child = subprocess.Popen(
            fill_placeholders(command, shared, folder),
            shell=True,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        with _terminating(child):
            seconds_to_match, printed = _read_output(child, until, began)
            _, status, usage = os.wait4(child.pid, 0)
            seconds_to_end = time.perf_counter() - began
            child.returncode = code = os.waitstatus_to_exitcode(status)
    shutil.rmtree(folder)
    if code:
        raise Fault(f"{name}: exit code {code} of {command}\n{log.read_text()[-2000:]}")
    if until and seconds_to_match is None:
        raise Fault(f"{name}: no line of its output matches {until}:\n{''.join(printed)[-2000:]}")
    seconds = seconds_to_match if until else seconds_to_end
    return CommandResult(seconds, usage.ru_utime + usage.ru_stime, _peak(usage))


def _read_output(
    child: subprocess.Popen, until: str | None, began: float
) -> tuple[float | None, list[str]]:
    """Read all output of the child; return (seconds until a line matched, the lines).

    After TIMEOUT_MINUTES the child is killed.
    """
    seconds_to_match = None
    printed = []
    timeout = threading.Timer(60 * TIMEOUT_MINUTES, os.killpg, (child.pid, signal.SIGKILL))
    timeout.daemon = True
    timeout.start()
    try:
        for text in child.stdout:
            printed.append(text)
            if until and seconds_to_match is None and re.search(until, text):
                seconds_to_match = time.perf_counter() - began
    finally:
        timeout.cancel()
    return seconds_to_match, printed


@contextlib.contextmanager
def _terminating(child: subprocess.Popen) -> Iterator[None]:
    """End the child after the block if it still runs.

    SIGTERM comes first, so that a training run ends its ranks, which have their own process groups.
    """
    try:
        yield
    finally:
        child.stdout.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if child.returncode is None:
                os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=20)


def _peak(usage: resource.struct_rusage) -> int | None:
    """Return peak resident bytes; None if not above this process's peak, which a child inherits."""
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage.ru_maxrss * 1024 if usage.ru_maxrss > 1.2 * own_peak else None
