"""Variants that are a line of a shell: how long it takes, to its end or to a line that it prints. No torch.

In a line {python} is this Python, {shared} a folder that the row's lines share, {folder} an empty one for each turn.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from mixtrain.errors import Fault

MINUTES = 30


def filled(line: str, shared: Path, folder: Path) -> str:
    for name, value in {"python": sys.executable, "shared": shared, "folder": folder}.items():
        line = line.replace(f"{{{name}}}", str(value))
    return line


def seconds(name: str, line: str, shared: Path, folder: Path, until: str | None, cwd: Path) -> tuple[float, float]:
    """Run the line in an empty `folder`: seconds until it ended, or printed a line in which `until` is found.

    And the CPU time of all processes it has waited for, to the end.
    """
    folder.mkdir(parents=True)
    log = folder.parent / f"{folder.name}.log"
    printed, seen = [], None
    with log.open("w") as errors:
        began, cpu_began = time.perf_counter(), _cpu_of_children()
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
        patience = threading.Timer(60 * MINUTES, os.killpg, (child.pid, signal.SIGKILL))
        patience.start()
        for text in child.stdout:
            printed.append(text)
            if until and seen is None and re.search(until, text):
                seen = time.perf_counter() - began
        code = child.wait()
        taken = time.perf_counter() - began
        patience.cancel()
    shutil.rmtree(folder)
    if code:
        raise Fault(f"{name}: exit code {code} of {line}\n{log.read_text()[-2000:]}")
    if until and seen is None:
        raise Fault(f"{name}: no line of its output matches {until}:\n{''.join(printed)[-2000:]}")
    return seen if until else taken, _cpu_of_children() - cpu_began


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system
