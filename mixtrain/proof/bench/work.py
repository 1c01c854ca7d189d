"""The repeated work that a benchmark measures: its batch, its memory, its result."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mixtrain.config.plan import Plan
from mixtrain.data.batches import IDS


@dataclass(frozen=True)
class Work:
    """`once` does the work and returns what it computed; `amount` is its size (tokens, bytes)."""

    once: Callable[[], dict[str, float]]  # "seconds" in the result replaces the measured time
    amount: float
    # waits until all earlier work has finished, on this rank and the others
    wait: Callable[[], None] = lambda: None
    # the norm of the gradients that `once` leaves; None if its result has it or it is not known
    norm: Callable[[], float] | None = None


class Memory:
    """The memory of this process: on a GPU that of its tensors, else resident memory from Linux.

    Call `begin` before the model is built: what libraries use until then is subtracted.
    """

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.base = 0

    def begin(self) -> None:
        self.base = 0 if self.gpu else _resident("VmRSS")

    def reset_peak(self) -> None:
        if self.gpu:
            return torch.cuda.reset_peak_memory_stats()
        # a container may forbid this; then the peak is over the life of the process
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return peak bytes since `reset_peak`."""
        if self.gpu:
            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM") - self.base

    def held(self) -> int:
        """Return the bytes in use now, between steps."""
        if self.gpu:
            return torch.cuda.memory_allocated()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
        return _resident("VmRSS") - self.base


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE).group(1)) * 1024


def microbatches(plan: Plan, rank: int = 0, size: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the microbatches of data-parallel rank `rank` of `size`: random tokens from the seed.

    All ranks together have the same global batch at every size.
    """
    trainer = plan.config.trainer
    length = plan.config.data.seq_length
    generator = torch.Generator().manual_seed(plan.config.seed)
    shape = (trainer.global_batch_size, length + 1)
    tokens = torch.randint(0, plan.config.model.vocab_size, shape, generator=generator)
    for rows in tokens[rank::size].split(trainer.micro_batch_size):
        yield {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "loss_mask": torch.ones(len(rows), length),
            "position_ids": torch.arange(length).repeat(len(rows), 1),
            IDS: torch.zeros(len(rows), dtype=torch.int64),
        }


def norm_of(gradients: Iterable[torch.Tensor]) -> float:
    return sum(gradient.double().pow(2).sum().item() for gradient in gradients) ** 0.5
