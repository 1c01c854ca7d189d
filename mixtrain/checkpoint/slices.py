"""A range of a flattened tensor as rectangular slices of the tensor. No torch.

A distributed optimizer shards each parameter into flat ranges; a checkpoint that any layout can
read stores rectangular slices. With this conversion each rank writes and reads only its own shard,
and no rank gathers a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class TensorSlice(NamedTuple):
    """A rectangular slice of a tensor: elements start..stop of the flattened tensor."""

    offset: tuple[int, ...]  # the index of its first element
    size: tuple[int, ...]  # along each axis
    start: int
    stop: int


def slices_of_range(
    shape: Sequence[int], start: int, stop: int, base: int = 0
) -> Iterator[TensorSlice]:
    """Yield elements start..stop of a row-major tensor, in order, in as few slices as possible.

    There are at most 2 * len(shape) - 1: the rest of a row, complete rows, the beginning of a row,
    and so on for the inner axes. `base` is added to each start and stop.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        axes = len(shape)
        yield TensorSlice((start,) * axes, (stop - start,) * axes, base + start, base + stop)
        return
    row = math.prod(shape[1:])
    # complete rows: first..last
    first = -(-start // row)
    last = stop // row
    if first > last:  # within one row
        yield from _slices_in_row(shape, last, start, stop, base)
        return
    yield from _slices_in_row(shape, first - 1, start, first * row, base)
    if first < last:
        inner = tuple(shape[1:])
        offset = (first, *(0 for _ in inner))
        yield TensorSlice(offset, (last - first, *inner), base + first * row, base + last * row)
    yield from _slices_in_row(shape, last, last * row, stop, base)


def _slices_in_row(
    shape: Sequence[int], number: int, start: int, stop: int, base: int
) -> Iterator[TensorSlice]:
    """Yield the slices of start..stop, which lie in row `number`."""
    row = math.prod(shape[1:])
    begin = number * row
    for inner in slices_of_range(shape[1:], start - begin, stop - begin, base + begin):
        yield TensorSlice((number, *inner.offset), (1, *inner.size), inner.start, inner.stop)
