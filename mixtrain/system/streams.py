"""What becomes of a run's output where its console is gone: a reader that has ended, a closed terminal, a full disk.

No torch. Rule: a run never ends because something cannot be printed. What standard output and standard error do not
take is appended to a log of the run directory, and once a process it is said that this is so.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import sys
from pathlib import Path

PIPE = "MIXTRAIN_PIPE"  # set by our own launcher: the descriptor of a pipe to it
NAMES = {1: "standard output", 2: "standard error"}
MOST = 1 << 20  # bytes that are kept for a log which is not there yet: the last ones
ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # colours and movements of a terminal that is gone


class Forgiving(io.FileIO):
    """A standard stream that is written as far as it can be; the rest goes to `pipe`, if there is one, or to a log."""

    log: Path | None = None  # of this process; its folder is made if that of the run is there
    left = b""  # what no log has taken yet
    said = False

    def __init__(self, descriptor: int, pipe: int | None):
        super().__init__(descriptor, "w", closefd=False)
        self.pipe = pipe
        self.is_lost = False

    def write(self, data) -> int:
        try:
            # another program has set it to not wait
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            if not self._passed(data):
                self._keep(self._lose(error.strerror) + bytes(data))
            return len(data)

    def look(self) -> None:
        """Notice that nobody reads it any more, before something is printed."""
        poll = select.poll()
        poll.register(self.fileno(), 0)
        if not self.is_lost and poll.poll(0):
            self._lose("nobody reads it")

    def _lose(self, reason: str) -> bytes:
        """Say, the first time, that it is lost; the line, for the log."""
        self.is_lost = True
        if Forgiving.said:
            return b""
        Forgiving.said = True
        where = self.log or "logs/console.log of its directory"
        name = NAMES[self.fileno()]
        words = (
            f"warning: {name} is lost ({reason}); the run goes on, and prints to {where}\n".encode()
        )
        with contextlib.suppress(OSError):  # a rank's standard error is its log
            os.write(2, words)
        return words

    def _passed(self, data) -> bool:
        """Whether the launcher has taken it, whose pipe does not wait."""
        with contextlib.suppress(OSError):
            return self.pipe is not None and os.write(self.pipe, data) == len(data)
        return False

    def _keep(self, data: bytes) -> None:
        """Append to the log; until its run directory is there, and for a moment's fault, keep what there is."""
        Forgiving.left = (self.left + ESCAPE.sub(b"", data))[-MOST:]
        if self.log is None:
            return
        with contextlib.suppress(OSError):
            if self.log.parent.parent.is_dir():
                self.log.parent.mkdir(exist_ok=True)
            with open(self.log, "ab", buffering=0) as file:
                file.write(self.left)
            Forgiving.left = b""


def hold() -> None:
    """Take the places of standard streams that the shell has closed (`>&-`): the next file would get them.

    What is printed would then be in it. To be called before anything is opened.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)


def forgive(log: str | Path | None = None) -> None:
    """From now on no print of this process fails because its reader, a terminal or a file system is gone.

    What is not taken goes to `log`, which another call may change.
    """
    Forgiving.log = Path(log) if log else Forgiving.log
    pipe = int(os.environ[PIPE]) if PIPE in os.environ else None
    if pipe is not None:
        os.set_inheritable(pipe, False)
    for descriptor, name, spill in ((1, "stdout", None), (2, "stderr", pipe)):
        stream = getattr(sys, name)
        if stream is None:
            _break(descriptor)
        elif raw_of(stream) or not _is(stream, descriptor):
            continue
        else:
            with contextlib.suppress(OSError):
                stream.flush()
        encoding = getattr(stream, "encoding", "utf-8")
        errors = getattr(stream, "errors", "backslashreplace")
        raw = io.BufferedWriter(Forgiving(descriptor, spill))
        setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=True))


def _break(descriptor: int) -> None:
    """A stream that was closed from the start is as a pipe that nobody reads, also for the ranks that inherit it."""
    unread, ours = os.pipe()
    os.close(unread)
    os.dup2(ours, descriptor)
    os.close(ours)


def _is(stream, descriptor: int) -> bool:
    """Whether the stream is that file; else it is somebody's own, who wants to have what is printed."""
    with contextlib.suppress(OSError, ValueError):
        return stream.fileno() == descriptor
    return False


def look() -> None:
    """Say it if nobody reads what this process prints, where that is forgiven."""
    for stream in (sys.stdout, sys.stderr):
        if raw := raw_of(stream):
            raw.look()


def raw_of(stream: object) -> Forgiving | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, Forgiving) else None
