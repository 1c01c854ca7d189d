"""Print a generation's progress to stderr; relay such lines from the first rank's log. No torch.

Rule: a line that begins with PREFIX is for the terminal; other output of a rank stays in its log.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

PREFIX = "generate: "
INTERVAL = 0.1  # seconds between two reads of the log


def print_progress(message: str) -> None:
    print(f"{PREFIX}{message}", file=sys.stderr, flush=True)


class LogRelay:
    """Context manager that prints a log's progress lines to stderr as they are written."""

    def __init__(self, log: Path):
        self.log = log
        self.offset = 0  # bytes relayed
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> LogRelay:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.ending.wait(INTERVAL):
            self._relay()
        self._relay()

    def _relay(self) -> None:
        """Print the progress lines that are new; an incomplete last line waits."""
        try:
            with open(self.log, "rb") as file:
                file.seek(self.offset)
                new = file.read()
        except FileNotFoundError:
            return
        lines = new[: new.rfind(b"\n") + 1]
        self.offset += len(lines)
        for line in lines.decode(errors="replace").splitlines():
            if line.startswith(PREFIX):
                print(line, file=sys.stderr, flush=True)
