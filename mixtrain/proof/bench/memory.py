"""Measures a process's memory: GPU memory if it uses a GPU, else resident memory from Linux.

Rule: memory that libraries use before the model is built is subtracted from both figures.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


class Memory:
    """Call `begin` after all imports and before the model is built."""

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.base = 0

    def begin(self) -> None:
        self.base = 0 if self.gpu else resident()

    def reset_peak(self) -> None:
        if self.gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            # a container may forbid this; then the peak is over the life of the process
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return peak bytes since `reset_peak`: of tensors on a GPU, of the process on a CPU."""
        if self.gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - self.base

    def held(self) -> int:
        """Return the bytes in use now, between steps."""
        if self.gpu:
            import torch

            return torch.cuda.memory_allocated()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
        return resident() - self.base


def resident() -> int:
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
