"""What else keeps the machine busy: machines are shared, and a turn beside somebody else's work says little. No torch.

Rule: it is measured in every turn and stands in the readings; nothing is left out silently.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

QUIET = 0.2  # CPUs that others may keep busy in a turn that counts as quiet
LOOK = 0.5  # seconds


def busy_seconds() -> float:
    """CPU time that this machine has spent on anything since it started, what other guests of its host took included.

    Linux says so; elsewhere it is always 0.
    """
    try:
        ticks = [
            int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        ]
    except (OSError, ValueError):
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = ticks[:8]
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


class Others:
    """Within the block something of ours works."""

    def __enter__(self) -> Others:
        self.busy_before = busy_seconds()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self.began
        self.all = busy_seconds() - self.busy_before

    def busy(self, own: float = 0.0) -> float:
        """CPUs that others kept busy on average; `own`: CPU seconds of ours."""
        return max(0.0, self.all - own) / self.seconds


def wait_for_quiet(patience_seconds: float) -> None:
    """Until others leave the machine alone, for as long as patience lasts. Nothing of ours works meanwhile."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        with Others() as others:
            time.sleep(LOOK)
        if others.busy() <= QUIET:
            return
