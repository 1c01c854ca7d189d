"""What a benchmark measures: something that is done again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What is measured. `once` does it and says what it computed, `amount` is how much that is (tokens, bytes)."""

    once: Callable[[], dict[str, float]]  # with "seconds" where that is not the time that it takes
    amount: float
    # until everything before has happened, here and on other ranks
    wait: Callable[[], None] = lambda: None
    # of the gradients that `once` has left, where it does not say so itself
    norm: Callable[[], float] | None = None
