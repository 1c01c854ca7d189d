"""What a generation says on standard error while it runs: the launcher, and through its log the first rank. No torch.

Rule: a line is for the terminal if it begins with PREFIX; all else that a rank says is for its log.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

PREFIX = "generate: "
SECONDS = 0.1  # between two looks


def say(words: str) -> None:
    print(f"{PREFIX}{words}", file=sys.stderr, flush=True)


class Follower:
    """Repeats the lines of a log that are for the terminal. Use as a context manager."""

    def __init__(self, log: Path):
        self.log = log
        self.read = 0
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.ending.wait(SECONDS):
            self._repeat()
        self._repeat()

    def _repeat(self) -> None:
        """What has come to the log since, as far as its lines are whole."""
        try:
            with open(self.log, "rb") as file:
                file.seek(self.read)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(PREFIX):
                print(line, file=sys.stderr, flush=True)
