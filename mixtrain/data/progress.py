"""How far preprocessing is: a bar on a terminal, a line now and then elsewhere.

The rule it keeps: everything goes to stderr (or to the log given), so that stdout holds the result
alone.
"""

import sys
import time

from mixtrain.characters import escaped

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Shows how much of the input was read, as a context manager. Where `log` is None it prints to stderr."""

    def __init__(self, doing: str, total: int | None, unit: str, log=None):
        self.doing = doing
        self.total = total
        self.unit = unit
        self.done = 0
        self.log = log or (lambda line: print(line, file=sys.stderr, flush=True))
        self.bar = _bar() if log is None and sys.stderr.isatty() else None
        self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.doing, total=self.total, note="")
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, done: int, note: str = "") -> None:
        """Count `done` more units of input; the note says what came of all of it so far."""
        self.done += done
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        elif time.monotonic() >= self.next_line:
            of = f" of {self.total:,}" if self.total is not None else ""
            self.log(
                f"preprocess: {self.doing}, {self.done:,}{of} {self.unit}"
                + (f": {note}" if note else "")
            )
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def complain(self, line: str) -> None:
        """Print one line about a document, above the bar where there is one."""
        line = escaped(line)  # a file may have any name, and any keys
        if self.bar is not None:
            self.bar.console.print(f"preprocess: {line}", markup=False, highlight=False)
        else:
            self.log(f"preprocess: {line}")


def _bar():
    from rich import progress

    from mixtrain.system.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
