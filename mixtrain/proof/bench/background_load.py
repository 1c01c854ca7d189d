"""Measures the CPU load of other processes: a turn on a busy machine says little. No torch.

Rule: the load is measured in every turn and is part of the reading; no reading is dropped silently.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

QUIET = 0.2  # CPUs that other processes may keep busy in a turn that counts as quiet
POLL_SECONDS = 0.5


def busy_seconds() -> float:
    """Return the CPU time spent since this machine booted, including time stolen by other guests.

    From Linux's /proc/stat; always 0 on other systems.
    """
    try:
        ticks = [
            int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        ]
    except (OSError, ValueError):
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = ticks[:8]
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


class BackgroundLoad:
    """Context manager that measures the load of other processes while a variant works."""

    def __enter__(self) -> BackgroundLoad:
        self.busy_before = busy_seconds()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self.began
        self.cpu_seconds = busy_seconds() - self.busy_before

    def busy_cpus(self, own_cpu_seconds: float = 0.0) -> float:
        """Return the CPUs that other processes kept busy on average."""
        return max(0.0, self.cpu_seconds - own_cpu_seconds) / self.seconds


def wait_for_quiet(patience_seconds: float) -> None:
    """Wait until other processes leave the machine idle, at most `patience_seconds`."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        with BackgroundLoad() as load:
            time.sleep(POLL_SECONDS)
        if load.busy_cpus() <= QUIET:
            return
