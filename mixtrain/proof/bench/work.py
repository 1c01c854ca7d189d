"""The repeated work that a benchmark measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """`once` does the work and returns what it computed; `amount` is its size (tokens, bytes)."""

    once: Callable[[], dict[str, float]]  # "seconds" in the result replaces the measured time
    amount: float
    # waits until all earlier work has finished, on this rank and the others
    wait: Callable[[], None] = lambda: None
    # the norm of the gradients that `once` leaves; None if its result has it or it is not known
    norm: Callable[[], float] | None = None
