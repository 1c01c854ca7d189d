"""What rules are made of: their type, and the nearest legal value. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from mixtrain.plan import Plan

Problems = Iterator[str]


def near_divisors(size: int, of: int) -> str:
    """The divisors of `of` next to `size`, as in `4 or 8`."""
    divisors = [number for number in range(1, of + 1) if of % number == 0]
    below, above = [d for d in divisors if d < size][-1:], [d for d in divisors if d > size][:1]
    return " or ".join(str(number) for number in below + above)


def near_multiples(size: int, of: int) -> str:
    """The multiples of `of` next to `size`, as in `96 or 112`."""
    below = size // of * of
    return " or ".join(str(number) for number in (below, below + of) if number > 0)


def must_divide(key: str, size: int, name: str, total: int) -> Problems:
    if total % size:
        yield f"{key} = {size} must divide {name} = {total}; use {near_divisors(size, total)}"


def world_words(plan: Plan) -> str:
    trainer = plan.config.trainer
    return f"trainer.devices * trainer.num_nodes = {trainer.devices}*{trainer.num_nodes} = {plan.world_size}"


def batch_sizes(plan: Plan) -> tuple[int, int, int]:
    return plan.config.trainer.global_batch_size, plan.config.trainer.micro_batch_size, plan.data_parallel_size
