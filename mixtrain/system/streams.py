"""Standard streams that survive a lost reader, a closed terminal or a full disk. No torch.

Rule: a run never ends because a print fails. Output that standard output or standard error does not
accept goes to a log in the run directory; each process warns once about it.
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
BUFFER = 1 << 20  # bytes: the newest output is kept until the log exists
ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # terminal colours and cursor movements


class TolerantStream(io.FileIO):
    """A standard stream whose writes never fail; refused output goes to the pipe or the log."""

    # shared by both streams of the process
    log: Path | None = None  # its folder is created once the run directory exists
    pending = b""  # output that the log has not taken yet
    has_warned = False

    def __init__(self, descriptor: int, pipe: int | None):
        super().__init__(descriptor, "w", closefd=False)
        self.pipe = pipe
        self.is_lost = False

    def write(self, data) -> int:
        try:
            # None: another program has set the file to nonblocking
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            if not self._write_to_pipe(data):
                self._write_to_log(self._lose(error.strerror) + bytes(data))
            return len(data)

    def check_reader(self) -> None:
        """Warn if the reader is gone, before anything is printed."""
        poll = select.poll()
        poll.register(self.fileno(), 0)
        if not self.is_lost and poll.poll(0):
            self._lose("nobody reads it")

    def _lose(self, reason: str) -> bytes:
        """Mark the stream as lost; print and return a warning, once per process."""
        self.is_lost = True
        if TolerantStream.has_warned:
            return b""
        TolerantStream.has_warned = True
        where = self.log or "logs/console.log of its directory"
        name = NAMES[self.fileno()]
        warning = f"warning: {name} is lost ({reason}); the run continues and prints to {where}\n"
        with contextlib.suppress(OSError):  # the standard error of a rank is its log
            os.write(2, warning.encode())
        return warning.encode()

    def _write_to_pipe(self, data) -> bool:
        """Return whether the launcher's pipe, which does not block, has taken all the data."""
        with contextlib.suppress(OSError):
            return self.pipe is not None and os.write(self.pipe, data) == len(data)
        return False

    def _write_to_log(self, data: bytes) -> None:
        """Append to the log; keep the data while the run directory is missing or writing fails."""
        TolerantStream.pending = (self.pending + ESCAPE.sub(b"", data))[-BUFFER:]
        if self.log is None:
            return
        with contextlib.suppress(OSError):
            if self.log.parent.parent.is_dir():
                self.log.parent.mkdir(exist_ok=True)
            with open(self.log, "ab", buffering=0) as file:
                file.write(self.pending)
            TolerantStream.pending = b""


def reserve() -> None:
    """Open the null device for standard streams that the shell has closed (`>&-`).

    Otherwise the next file opened would get their descriptor, and everything printed. Call it
    before any file is opened.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)


def make_tolerant(log: str | Path | None = None) -> None:
    """Make prints of this process succeed when the reader, terminal or file system is gone.

    Refused output goes to `log`; a later call may change it.
    """
    TolerantStream.log = Path(log) if log else TolerantStream.log
    pipe = int(os.environ[PIPE]) if PIPE in os.environ else None
    if pipe is not None:
        os.set_inheritable(pipe, False)
    for descriptor, name, fallback in ((1, "stdout", None), (2, "stderr", pipe)):
        stream = getattr(sys, name)
        if stream is None:
            _open_broken_pipe(descriptor)
        elif tolerant_raw(stream) or not _has_descriptor(stream, descriptor):
            continue
        else:
            with contextlib.suppress(OSError):
                stream.flush()
        encoding = getattr(stream, "encoding", "utf-8")
        errors = getattr(stream, "errors", "backslashreplace")
        raw = io.BufferedWriter(TolerantStream(descriptor, fallback))
        setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=True))


def _open_broken_pipe(descriptor: int) -> None:
    """Replace a stream closed from the start by a pipe without a reader; child ranks inherit it."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.dup2(write_end, descriptor)
    os.close(write_end)


def _has_descriptor(stream, descriptor: int) -> bool:
    """Return whether the stream writes to that descriptor; otherwise a caller has replaced it."""
    with contextlib.suppress(OSError, ValueError):
        return stream.fileno() == descriptor
    return False


def check_readers() -> None:
    """Warn if the reader of a tolerant stream of this process is gone."""
    for stream in (sys.stdout, sys.stderr):
        if raw := tolerant_raw(stream):
            raw.check_reader()


def tolerant_raw(stream: object) -> TolerantStream | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, TolerantStream) else None
