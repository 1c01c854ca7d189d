"""Watch the main thread's heartbeats; print stacks and exit when they stop. No torch.

Rule: one watchdog per process, and it ends the process. A rank that waits for a hung rank stands
still too, so every rank reports where it is; the launcher asks (SIGUSR2) those that cannot report
by themselves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mixtrain.errors import FAULT

LENGTH = 64  # bytes of a record in the file that the launcher reads
ARM_SECONDS = 0.2  # between two calls that re-arm the backstop
PAUSE = 1.0  # s before the exit: other ranks report before they lose this one
STANDS_STILL = "stands still"  # in the message of a watchdog that ended its rank
BACKSTOP = 1.5  # times the timeout: for a main thread that never releases the GIL


class Heartbeat(NamedTuple):
    """The last heartbeat: the step and what the rank was doing."""

    step: int
    doing: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.doing})"


class Watchdog:
    """Watches this process from its first heartbeat; a context manager for the main thread.

    Before it ends the process it calls `on_stall` with the message.
    """

    def __init__(
        self, rank: int, minutes: float, folder: str | None, on_stall: Callable[[str], None]
    ):
        self.rank = rank
        self.timeout = 60 * minutes
        self.on_stall = on_stall
        self.file = self.stacks = None
        # without these files, as on a full disk, the launcher reports less of a rank that fails
        with contextlib.suppress(OSError):
            self.file = open(heartbeat_file(folder, rank), "w") if folder else None
            # not stderr: after SIGCONT several timers of a process write there at once
            self.stacks = open(stacks_file(folder, rank), "w") if folder else None
        self.last = Heartbeat(0, "start")
        self.at = None
        self.armed = 0.0
        self.done = threading.Event()

    def __enter__(self) -> Watchdog:
        global _active
        _active = self
        faulthandler.enable()  # a fatal signal prints the stacks: NCCL aborts
        # SIGUSR2: the launcher asks for the stacks
        faulthandler.register(signal.SIGUSR2, self.stacks or sys.stderr, all_threads=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        self.done.set()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        for file in (self.file, self.stacks):
            if file:
                file.close()

    def heartbeat(self, doing: str, step: int | None = None) -> None:
        """Record that the main thread is alive, and what it is doing."""
        self.last = Heartbeat(self.last.step if step is None else step, doing)
        self.at = time.monotonic()
        if self.file:
            record = f"{self.last.step} {doing}".ljust(LENGTH)[:LENGTH].encode()
            with contextlib.suppress(OSError):
                os.pwrite(self.file.fileno(), record, 0)
        if self.at - self.armed > ARM_SECONDS:
            self.armed = self.at
            faulthandler.dump_traceback_later(BACKSTOP * self.timeout + 1, exit=True)

    def _watch(self) -> None:
        while not self.done.wait(min(1.0, self.timeout / 10)):
            if self.at is not None and time.monotonic() - self.at > self.timeout:
                self._end()

    def _end(self) -> None:
        message = f"rank {self.rank} {STANDS_STILL} in {self.last} for {self.timeout:.0f} s"
        print(f"mixtrain: {message}; its stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        try:
            self.on_stall(message)
            time.sleep(PAUSE)
        finally:
            os._exit(FAULT)


_active: Watchdog | None = None


def heartbeat(doing: str, step: int | None = None) -> None:
    """Record a heartbeat of the main thread with the active watchdog, if there is one."""
    if _active is not None:
        _active.heartbeat(doing, step)


def heartbeat_file(folder: str | Path, rank: int) -> Path:
    """Return the file of a rank's heartbeat, which this project's launcher reads."""
    return Path(folder) / f"heartbeat_{rank}"


def stacks_file(folder: str | Path, rank: int) -> Path:
    """Return the file to which a rank prints its stacks on SIGUSR2."""
    return Path(folder) / f"stacks_{rank}"


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Return a rank's last heartbeat; None if there is none."""
    try:
        step, _, doing = path.read_text().strip().partition(" ")
        return Heartbeat(int(step), doing)
    except (OSError, ValueError):
        return None


def main_stack(log: str) -> list[str]:
    """Return the main thread's frames, innermost first, from faulthandler's dump of all threads.

    The main thread is the one whose outermost frame is not _bootstrap.
    """
    for dump in log.split("(most recent call first):\n")[1:]:
        frames = []
        for line in dump.splitlines():
            if not re.fullmatch(r'  File ".*", line \d+ in \S+', line):
                break
            frames.append(line.strip())
        if frames and not frames[-1].endswith(" in _bootstrap"):
            return frames
    return []
