"""The request to end a run: a signal, noted at any time, granted after the running step. No torch."""

from __future__ import annotations

import contextlib
import os
import signal

from mixtrain.errors import FINISHED

# batch systems; Ctrl-C; a closed terminal; Slurm's warning of the time limit (--signal=USR1@120):
# one meaning for all
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


_early: list[int] = []  # signals that were noted before there was a StopRequest


class StopRequest:
    """The signals that asked, in their order. Use as a context manager, on the main thread."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    @property
    def signal(self) -> int | None:
        """The signal that asked first, or None."""
        return self.signals[0] if self.signals else None

    @property
    def at_once(self) -> bool:
        """Asked again by Ctrl-C or SIGTERM: somebody will not wait. A closed terminal may send SIGHUP twice itself."""
        return sum(number in (signal.SIGINT, signal.SIGTERM) for number in self.signals) > 1

    def __enter__(self) -> StopRequest:
        self._before = _handle(lambda number, _frame: self.signals.append(number))
        self.signals[:0], _early[:] = list(_early), []
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def exit_on_request() -> None:
    """From now on, until a StopRequest is entered, a signal ends this process: nothing has been started or written."""

    def leave(_number: int, _frame: object) -> None:
        with contextlib.suppress(OSError):  # the reader of a pipe has heard Ctrl-C too
            # print may be interrupted in a print
            os.write(2, b"mixtrain: stopped before a run was started\n")
        os._exit(FINISHED)  # an exception would be caught by whatever import or Hydra is at

    _handle(leave)


def note_requests() -> None:
    """From now on, until a StopRequest is entered, a signal is noted for it: the run then stops after its first step.

    For a rank that torchrun or Slurm has started: all ranks are signalled, and one that left alone would be waited for.
    """
    _handle(lambda number, _frame: _early.append(number))


def _handle(handler) -> dict[int, object]:
    """Set the handler of every signal that asks; the handlers before. What nohup has had ignored stays ignored."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}
