"""A range of a flattened tensor as boxes of the tensor itself. No torch.

A distributed optimizer deals out flat ranges of a parameter; a checkpoint that any layout reads
holds boxes. So each rank writes and reads its own part alone, without gathering a parameter
anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A box of a tensor: its first element and its size along each axis, and its elements in the flat tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    stop: int


def boxes(shape: Sequence[int], start: int, stop: int, base: int = 0) -> Iterator[Box]:
    """The elements start..stop of a row-major tensor of `shape`, in order, in as few boxes as its axes allow.

    At most 2 * len(shape) - 1 of them: what is left of a row, whole rows, the beginning of a row, and so on inward.
    `base` is added to where they start and stop.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield Box((start,) * len(shape), (stop - start,) * len(shape), base + start, base + stop)
        return
    row = math.prod(shape[1:])
    # the whole rows
    first = -(-start // row)
    last = stop // row
    if first > last:  # within one row
        yield from _inside(shape, last, start, stop, base)
        return
    yield from _inside(shape, first - 1, start, first * row, base)
    if first < last:
        rest = tuple(shape[1:])
        yield Box(
            (first, *(0 for _ in rest)),
            (last - first, *rest),
            base + first * row,
            base + last * row,
        )
    yield from _inside(shape, last, last * row, stop, base)


def _inside(shape: Sequence[int], number: int, start: int, stop: int, base: int) -> Iterator[Box]:
    """The boxes of start..stop, which lie in row `number`."""
    row = math.prod(shape[1:])
    for box in boxes(shape[1:], start - number * row, stop - number * row, base + number * row):
        yield Box((number, *box.offset), (1, *box.size), box.start, box.stop)
