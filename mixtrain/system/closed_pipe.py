"""What becomes of a command when nobody reads what it prints any more, as in `| head -3`. No torch.

Rule: it ends as other tools of Unix do, by SIGPIPE and without a word; a shell shows exit code 141.
Until then SIGPIPE is ignored, as Python has it: a rank whose peer has left a socket would end as
well. A training run is another matter: what it prints is not what it is for, and it goes on
(system/streams.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable

from mixtrain.system import streams


def ended(main: Callable[..., int], *arguments: object) -> int:
    """What `main` returns, once all that it printed has been written."""
    try:
        try:
            return main(*arguments)
        finally:  # --help leaves by SystemExit, with its text in the buffer
            flush()
    except BrokenPipeError:
        if not reader_has_gone():  # a child's input, or a socket: that is another fault
            raise
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(128 + signal.SIGPIPE)  # where the signal is blocked


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:  # closed by the shell: >&-
            stream.flush()


def reader_has_gone() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads, and the command ends because of it."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        if streams.raw_of(stream):
            continue
        with contextlib.suppress(AttributeError, OSError, ValueError):
            poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
