"""A rank that the launcher started; its output arrives even if the log's disk is full. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from mixtrain.system.streams import PIPE

MOST = 1 << 16  # bytes: how much of the output that the log did not take is kept, the end of it


class RankProcess:
    """A rank in its own process group. OSError if its log or the process cannot be created."""

    def __init__(
        self, command: tuple[str, ...], environment: dict[str, str], log: Path, on_console: bool
    ):
        self.log = log
        self.pipe_output = b""
        # also read through this handle, so the log may lose its name
        self.file = open(log, "w+b", buffering=0)
        self.pipe, write_end = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(write_end, False)
        try:
            self.process = subprocess.Popen(
                command,
                env=environment | {PIPE: str(write_end)},
                stdin=subprocess.DEVNULL,
                stdout=None if on_console else self.file,
                stderr=self.file,
                start_new_session=True,
                pass_fds=[write_end],
            )
        except OSError:
            self.close()
            raise
        finally:
            os.close(write_end)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs; also drain the pipe, so it does not fill."""
        code = self.process.poll()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.pipe, MOST):
                self.pipe_output = (self.pipe_output + data)[-MOST:]
        return code

    def kill(self) -> None:
        """Kill the process group: the rank, and helper processes that it left behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended already
            os.killpg(self.process.pid, signal.SIGKILL)

    def text(self) -> str:
        """Return its log, and the output that the log did not take."""
        size = os.fstat(self.file.fileno()).st_size
        return (os.pread(self.file.fileno(), size, 0) + self.pipe_output).decode(errors="replace")

    def append(self, text: str) -> None:
        """Append to its log if possible."""
        with contextlib.suppress(OSError):
            self.file.write(text.encode())

    def close(self) -> None:
        self.file.close()
        os.close(self.pipe)
