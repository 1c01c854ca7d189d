"""Stop requests: signals, recorded at any time; the run stops after its current step. No torch."""

from __future__ import annotations

import contextlib
import os
import signal

from mixtrain.errors import FINISHED

SIGNALS = (
    signal.SIGTERM,  # batch systems
    signal.SIGINT,  # Ctrl-C
    signal.SIGHUP,  # a closed terminal
    signal.SIGUSR1,  # Slurm's warning of the time limit (--signal=USR1@120)
)

_early: list[int] = []  # signals recorded by note_requests before a StopRequest was entered


class StopRequest:
    """The stop signals received so far, in order; a context manager for the main thread."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    @property
    def signal(self) -> int | None:
        """The first stop signal, or None."""
        return self.signals[0] if self.signals else None

    @property
    def at_once(self) -> bool:
        """Whether to stop without finishing the step: two or more of Ctrl-C and SIGTERM.

        SIGHUP does not count: a closed terminal may send it twice.
        """
        return sum(number in (signal.SIGINT, signal.SIGTERM) for number in self.signals) > 1

    def __enter__(self) -> StopRequest:
        self._before = _handle(lambda number, _frame: self.signals.append(number))
        self.signals[:0], _early[:] = list(_early), []
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def exit_on_request() -> None:
    """Have a stop signal end this process until a StopRequest is entered.

    For the time in which nothing has been started or written.
    """

    def leave(_number: int, _frame: object) -> None:
        with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe too
            # not print, which the signal may have interrupted
            os.write(2, b"mixtrain: stopped before a run was started\n")
        os._exit(FINISHED)  # Hydra or an import could catch an exception

    _handle(leave)


def note_requests() -> None:
    """Record stop signals for the next StopRequest: the run then stops after its first step.

    For ranks that torchrun or Slurm started: all ranks get the signal, and the others would wait
    for one that exits.
    """
    _handle(lambda number, _frame: _early.append(number))


def _handle(handler) -> dict[int, object]:
    """Set the handler of every stop signal that nohup does not ignore; return the old ones."""
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}
