"""How much memory a process takes: of the GPU where it has one, else resident memory as Linux counts it.

Rule: what libraries take before anything is built is not the work's and is left out of both figures.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


class Memory:
    """`begin` is called when everything is imported and before anything is built."""

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.base = 0

    def begin(self) -> None:
        self.base = 0 if self.gpu else resident()

    def forget_peak(self) -> None:
        """From now on a new peak is looked for."""
        if self.gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            # a container may forbid it: then the peak is that of the process's life
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes at the most since `forget_peak`, of tensors on a GPU, of everything on a CPU."""
        if self.gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - self.base

    def held(self) -> int:
        """Bytes held now, when no step is under way."""
        if self.gpu:
            import torch

            return torch.cuda.memory_allocated()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # give back what is free but kept
        return resident() - self.base


def resident() -> int:
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
