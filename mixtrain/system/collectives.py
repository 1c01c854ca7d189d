"""Collectives of Python objects: all ranks get the same answer.

Every rank of the group must call a function, in the same order. They pickle, which is slow: within
a step use tensors. Without a process group (a tool) the caller is the only rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gather(value: T, group: Any = None) -> list[T]:
    """Return every rank's `value` on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def gather_on_first(value: T) -> list[T]:
    """Return every rank's `value` on the first rank, an empty list on the others."""
    first = torch.distributed.get_rank() == 0
    values: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(value, values, dst=0)
    return values or []


def from_first(read: Callable[[], T]) -> T:
    """Return what `read` returns on the first rank, which alone calls it."""
    if not torch.distributed.is_initialized():
        return read()
    values: list[Any] = [read() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def failures(problem: T) -> list[tuple[int, T]]:
    """Return (rank, problem) of each rank whose `problem` is not empty."""
    return [(rank, there) for rank, there in enumerate(gather(problem)) if there]


def first_problem(problem: T) -> T:
    """Return the problem of the first rank that has one, so that all ranks stop at the same."""
    return next((there for _, there in failures(problem)), problem)


def ranks_where(flag: bool) -> list[int]:
    """Return the ranks on which `flag` is true."""
    return [rank for rank, _ in failures(flag)]


def total(number: int, device: torch.device) -> int:
    """Return the sum of `number` over all ranks. Not pickled: it may be called in every step."""
    numbers = torch.tensor([number], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(numbers)
    return int(numbers.item())
