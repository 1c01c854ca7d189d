"""End a command whose output pipe is closed, as in `| head -3`. No torch.

Rule: such a command ends silently by SIGPIPE, like other Unix tools; a shell shows exit code 141.
Python ignores SIGPIPE until then, because it would also end a rank whose peer has closed a socket.
A training run continues without a reader instead (system/streams.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable

from mixtrain.system import streams


def run_main(main: Callable[..., int], *arguments: object) -> int:
    """Return what `main` returns and flush its output; end by SIGPIPE if the pipe is closed."""
    try:
        try:
            return main(*arguments)
        finally:  # --help raises SystemExit with its text still in the buffer
            flush()
    except BrokenPipeError:
        if not reader_has_gone():  # the pipe to a child, or a socket: an error of the command
            raise
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(128 + signal.SIGPIPE)  # the signal is blocked


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:  # None: closed by the shell, >&-
            stream.flush()


def reader_has_gone() -> bool:
    """Return whether stdout or stderr is a pipe without a reader; tolerant streams do not count."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        if streams.tolerant_raw(stream):
            continue
        with contextlib.suppress(AttributeError, OSError, ValueError):
            poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
