"""A rank that this process has started, whose words reach it whatever becomes of the disk of its log. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from mixtrain.system.streams import PIPE

MOST = 1 << 16  # bytes that are kept of what the log did not take: the last ones


class RankProcess:
    """A rank, in a process group of its own. OSError if its log cannot be made, or it cannot be started."""

    def __init__(
        self, command: tuple[str, ...], environment: dict[str, str], log: Path, speaks: bool
    ):
        self.log = log
        self.passed = b""
        # read by this, so that it need not be there under its name
        self.file = open(log, "w+b", buffering=0)
        self.pipe, theirs = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(theirs, False)
        try:
            self.process = subprocess.Popen(
                command,
                env=environment | {PIPE: str(theirs)},
                stdin=subprocess.DEVNULL,
                stdout=None if speaks else self.file,
                stderr=self.file,
                start_new_session=True,
                pass_fds=[theirs],
            )
        except OSError:
            self.close()
            raise
        finally:
            os.close(theirs)

    def poll(self) -> int | None:
        """Its exit code, None while it runs. What it passes on is taken meanwhile, so that there is room for more."""
        code = self.process.poll()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.pipe, MOST):
                self.passed = (self.passed + data)[-MOST:]
        return code

    def kill(self) -> None:
        """End its whole process group: the rank if it is still there, and the helpers it has left behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all have gone already
            os.killpg(self.process.pid, signal.SIGKILL)

    def text(self) -> str:
        """Its log, and what the log did not take."""
        size = os.fstat(self.file.fileno()).st_size
        return (os.pread(self.file.fileno(), size, 0) + self.passed).decode(errors="replace")

    def append(self, text: str) -> None:
        """Add to its log, if that takes it."""
        with contextlib.suppress(OSError):
            self.file.write(text.encode())

    def close(self) -> None:
        self.file.close()
        os.close(self.pipe)
