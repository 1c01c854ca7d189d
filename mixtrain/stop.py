"""The request to end a run: SIGTERM or SIGINT, noted at any time, granted after the running step. No torch."""

from __future__ import annotations

import signal


class StopRequest:
    """`signal` is the number of the signal that asked, or None. Use as a context manager, on the main thread."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.signal = number
