"""A shell with job control in a pseudo-terminal, as a user has it: Ctrl-C goes to all of a
pipeline.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from composing import ROOT, unstarted_environment


class Terminal:
    """`command` and `rest`, as in `| tee log`, typed in a terminal of its own; what it shows is in
    `text`.

    Every wait is bounded.
    """

    def __init__(self, command: str, rest: str, folder: Path):
        self.code = folder / "code"
        self.text = ""
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            self._be_a_shell()
        self.wait_until(lambda: "$ " in self.text, 30)
        os.write(self.terminal, f"(trap : INT; {command}; echo $? > {self.code}) {rest}\n".encode())

    @staticmethod
    def _be_a_shell() -> None:
        try:
            # tests that run in the background have them ignored
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            # the shell's commands may lie beside Slurm's
            here = {"PS1": "$ ", "PATH": os.environ["PATH"]}
            os.chdir(ROOT)
            shell = ["bash", "--noprofile", "--norc", "--noediting", "-i"]
            os.execvpe("bash", shell, unstarted_environment() | here)
        finally:
            os._exit(127)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self.wait_until(lambda: os.waitpid(self.process, os.WNOHANG)[0], 60)

    def press_ctrl_c(self) -> None:
        os.write(self.terminal, b"\x03")

    def hang_up(self) -> None:
        if self.terminal >= 0:
            os.close(self.terminal)
            self.terminal = -1

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text[-3000:]
            if self.terminal >= 0 and select.select([self.terminal], [], [], 0.02)[0]:
                try:
                    self.text += os.read(self.terminal, 1 << 16).decode(errors="replace")
                except OSError:  # nobody writes to it any more
                    time.sleep(0.02)
            else:
                time.sleep(0.02)

    def exit_code(self, seconds: float = 60) -> int:
        """Of the command, once it has ended."""
        self.wait_until(
            lambda: self.code.exists() and self.code.read_text().endswith("\n"), seconds
        )
        return int(self.code.read_text())
