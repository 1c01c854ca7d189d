"""Whether this rank still moves: beats of the main thread, and what is said and done when none comes. No torch.

Rule: one watchdog a process, and it ends the process. A rank that waits for a hung one stands still as well, so that
all of them say where they are; the launcher asks those that cannot.
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
SECONDS = 0.2  # between two settings of the backstop
PAUSE = 1.0  # s before the end, for other ranks to speak before they lose this one
STANDS_STILL = "stands still"  # in the line of a watchdog that has ended its rank
BACKSTOP = 1.5  # times the timeout: for a main thread that never lets another run


class Heartbeat(NamedTuple):
    """The last sign of life: the step it was in, and what it was doing."""

    step: int
    doing: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.doing})"


class Watchdog:
    """Watches this process from the first beat on. Use as a context manager, on the main thread.

    `last_words` is called with the line that says what has happened, before the process ends.
    """

    def __init__(
        self, rank: int, minutes: float, folder: str | None, last_words: Callable[[str], None]
    ):
        self.rank = rank
        self.timeout = 60 * minutes
        self.last_words = last_words
        self.file = self.stacks = None
        # a full disk: the launcher will say less of a rank that fails
        with contextlib.suppress(OSError):
            self.file = open(heartbeat_file(folder, rank), "w") if folder else None
            # a file of its own: a process that goes on after SIGCONT has several timers that write
            # to stderr at once
            self.stacks = open(stacks_file(folder, rank), "w") if folder else None
        self.last = Heartbeat(0, "start")
        self.at = None
        self.armed = 0.0
        self.done = threading.Event()

    def __enter__(self) -> Watchdog:
        global _active
        _active = self
        faulthandler.enable()  # a fatal signal prints the stacks: NCCL aborts
        # the launcher asks
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
        """The main thread is alive, and doing this."""
        self.last = Heartbeat(self.last.step if step is None else step, doing)
        self.at = time.monotonic()
        if self.file:
            with contextlib.suppress(OSError):
                os.pwrite(
                    self.file.fileno(),
                    f"{self.last.step} {doing}".ljust(LENGTH)[:LENGTH].encode(),
                    0,
                )
        if self.at - self.armed > SECONDS:
            self.armed = self.at
            faulthandler.dump_traceback_later(BACKSTOP * self.timeout + 1, exit=True)

    def _watch(self) -> None:
        while not self.done.wait(min(1.0, self.timeout / 10)):
            if self.at is not None and time.monotonic() - self.at > self.timeout:
                self._end()

    def _end(self) -> None:
        words = f"rank {self.rank} {STANDS_STILL} in {self.last} for {self.timeout:.0f} s"
        print(f"mixtrain: {words}; its stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        try:
            self.last_words(words)
            time.sleep(PAUSE)
        finally:
            os._exit(FAULT)


_active: Watchdog | None = None


def heartbeat(doing: str, step: int | None = None) -> None:
    """A sign of life from wherever the main thread is; nothing where nobody watches."""
    if _active is not None:
        _active.heartbeat(doing, step)


def heartbeat_file(folder: str | Path, rank: int) -> Path:
    """Where a rank of our own launcher leaves its beats."""
    return Path(folder) / f"heartbeat_{rank}"


def stacks_file(folder: str | Path, rank: int) -> Path:
    """Where it prints its stacks when it is asked with SIGUSR2."""
    return Path(folder) / f"stacks_{rank}"


def read_heartbeat(path: Path) -> Heartbeat | None:
    """The last sign of life that a rank has left; None if there was none."""
    try:
        step, _, doing = path.read_text().strip().partition(" ")
        return Heartbeat(int(step), doing)
    except (OSError, ValueError):
        return None


def main_stack(log: str) -> list[str]:
    """The frames of the main thread, innermost first, in a dump of stacks: those that do not end in _bootstrap."""
    for dump in log.split("(most recent call first):\n")[1:]:
        frames = []
        for line in dump.splitlines():
            if not re.fullmatch(r'  File ".*", line \d+ in \S+', line):
                break
            frames.append(line.strip())
        if frames and not frames[-1].endswith(" in _bootstrap"):
            return frames
    return []
