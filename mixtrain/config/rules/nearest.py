"""Helpers of the rules: the type of their result, and the nearest legal values. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from mixtrain.config.plan import Plan

Problems = Iterator[str]


def nearest(size: int, legal: Iterable[int]) -> str:
    """Return the legal numbers next to `size`, as in `4 or 8`; never `size` itself."""
    numbers = sorted(set(legal))
    below = [n for n in numbers if n < size][-1:]
    above = [n for n in numbers if n > size][:1]
    return " or ".join(str(number) for number in below + above)


def near_divisors(size: int, of: int) -> str:
    """Return the divisors of `of` next to `size`."""
    return nearest(size, [number for number in range(1, of + 1) if of % number == 0])


def near_multiples(size: int, of: int) -> str:
    """Return the multiples of `of` next to `size`, as in `96 or 112`."""
    below = (size - 1) // of * of
    return nearest(size, [number for number in (below, below + of, below + 2 * of) if number > 0])


def must_divide(key: str, size: int, name: str, total: int) -> Problems:
    yield from must_divide_each(key, size, {name: total})


def must_divide_each(key: str, size: int, totals: dict[str, int]) -> Problems:
    """Yield a problem per total that `size` does not divide; the hint divides all totals."""
    use = near_divisors(size, math.gcd(*totals.values()))
    for name, total in totals.items():
        if total % size:
            yield f"{key} = {size} must divide {name} = {total}; use {use}"


def world_size_text(plan: Plan) -> str:
    trainer = plan.config.trainer
    return (
        f"trainer.devices * trainer.num_nodes = {trainer.devices}*{trainer.num_nodes} ="
        f" {plan.world_size}"
    )


def batch_sizes(plan: Plan) -> tuple[int, int, int]:
    """Return (global batch, micro batch, data parallel size)."""
    trainer = plan.config.trainer
    return trainer.global_batch_size, trainer.micro_batch_size, plan.data_parallel_size


def dense_ranks_fit(plan: Plan) -> bool:
    """Return whether the dense grid divides the world size; otherwise DP is a rounded number."""
    return plan.world_size % plan.layout.dense_grid == 0


def ranks_fit(plan: Plan) -> bool:
    """Return whether the dense grid and the expert grid divide the world size."""
    return dense_ranks_fit(plan) and plan.world_size % plan.layout.expert_grid == 0
