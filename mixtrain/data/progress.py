"""Progress of preprocessing: a bar on a terminal, otherwise a line every few seconds.

Rule: everything goes to stderr (or to the given log); stdout holds only the result.
"""

import sys
import time

from mixtrain.characters import escaped

SECONDS_BETWEEN_LINES = 10


class PreprocessProgress:
    """Context manager that shows how much input was read, on stderr unless `log` is given."""

    def __init__(self, activity: str, total: int | None, unit: str, log=None):
        self.activity = activity
        self.total = total
        self.unit = unit
        self.done = 0
        self.log = log or (lambda line: print(line, file=sys.stderr, flush=True))
        self.bar = _bar() if log is None and sys.stderr.isatty() else None
        self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> "PreprocessProgress":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.activity, total=self.total, note="")
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, done: int, note: str = "") -> None:
        """Add `done` units of input; the note shows the result so far."""
        self.done += done
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        elif time.monotonic() >= self.next_line:
            of_total = f" of {self.total:,}" if self.total is not None else ""
            suffix = f": {note}" if note else ""
            self.log(f"preprocess: {self.activity}, {self.done:,}{of_total} {self.unit}{suffix}")
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def complain(self, line: str) -> None:
        """Print one line about a document, above the bar if there is one."""
        line = escaped(line)  # file names and JSON keys may contain any character
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
