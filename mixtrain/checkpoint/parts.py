"""The tensors of a checkpoint, read part by part, whatever layout wrote them: windows on its files where they can be.

Rule: a stored chunk's shape is held against the index, and its bytes are found in the zip file that PyTorch made of it
(archive.py). No process group, no whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from mixtrain.checkpoint import safe
from mixtrain.checkpoint.archive import Archive
from mixtrain.checkpoint.slices import Box, boxes
from mixtrain.errors import UserError
from mixtrain.system.mmap_tensor import map_tensor


class Chunk(NamedTuple):
    """A stored box of a tensor."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    path: Path
    start: int  # bytes: its zip file within the file
    length: int


class Parts:
    """The tensors of one checkpoint directory."""

    def __init__(self, directory: Path):
        """UserError if there is no index to read, or it is damaged."""
        metadata = safe.read_metadata(directory)
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.singles: dict[str, int] = {}  # how many leading axes are cut one by one
        self.chunks: dict[tuple, list[Chunk]] = {}  # by key and place along these axes
        self.data: dict[Chunk, int] = {}  # byte at which its numbers begin
        for key, kind in metadata.state_dict_metadata.items():
            if isinstance(kind, TensorStorageMetadata):
                self._add(key, kind, metadata.storage_data)

    def _add(self, key: str, kind: TensorStorageMetadata, places: dict) -> None:
        self.shapes[key] = tuple(kind.size)
        self.dtypes[key] = kind.properties.dtype
        axes = 0
        while axes < len(kind.size) and all(chunk.sizes[axes] == 1 for chunk in kind.chunks):
            axes += 1
        self.singles[key] = axes
        for chunk in kind.chunks:
            place = places[MetadataIndex(key, chunk.offsets)]
            path = self.directory / place.relative_path
            stored = Chunk(
                key, tuple(chunk.offsets), tuple(chunk.sizes), path, place.offset, place.length
            )
            self.chunks.setdefault((key, stored.offset[:axes]), []).append(stored)

    def files(self, keys: Iterable[str]) -> set[str]:
        """The names of the files that hold some of these tensors."""
        wanted = set(keys)
        return {
            chunk.path.name
            for (key, _), chunks in self.chunks.items()
            if key in wanted
            for chunk in chunks
        }

    def at(self, key: str, numbers: tuple[int, ...] = ()) -> torch.Tensor:
        """A part of a tensor: that at the place `numbers` of its first axes, or all of it."""
        shape = self.shapes[key]
        first = 0
        for size, number in zip(shape, numbers, strict=False):
            first = first * size + number
        rest = shape[len(numbers) :]
        count = math.prod(rest)
        return self.flat(key, first * count, (first + 1) * count).view(rest)

    def flat(self, key: str, start: int, stop: int) -> torch.Tensor:
        """The elements start..stop of the flat tensor: a window where they lie together, else a copy."""
        shape = self.shapes[key]
        dtype = self.dtypes[key]
        found = list(boxes(shape, start, stop))
        if len(found) == 1 and (seen := self._window(key, found[0])) is not None:
            return seen
        out = torch.empty(stop - start, dtype=dtype)
        filled = 0
        for box in found:
            view = out[box.start - start : box.stop - start].view(box.size)
            filled += sum(self._copy(chunk, box, view) for chunk in self._near(key, box))
        if filled != stop - start:
            raise UserError(
                f"{self.directory}: {key} has a hole: {stop - start - filled:,} numbers lie in no"
                " file"
            )
        return out

    def together(self, key: str, start: int, most: int) -> int:
        """Where the elements from `start` on end that lie together in one chunk; no more than `most` of them.

        Where a chunk holds parts of rows: `most`, which are then copied together.
        """
        shape = self.shapes[key]
        axes = self.singles[key]
        place = numpy.unravel_index(start, shape)
        for chunk in self.chunks.get((key, tuple(map(int, place[:axes]))), ()):
            inside = all(
                at <= number < at + size
                for at, number, size in zip(chunk.offset, place, chunk.size, strict=True)
            )
            if inside and chunk.size[axes + 1 :] == shape[axes + 1 :]:
                first = sum(
                    at * stride for at, stride in zip(chunk.offset, _strides(shape), strict=True)
                )
                return min(start + most, first + math.prod(chunk.size))
        return start + most

    def _near(self, key: str, box: Box) -> Iterator[Chunk]:
        """The chunks that may have some of a box."""
        axes = self.singles[key]
        spans = (
            range(at, at + size)
            for at, size in zip(box.offset[:axes], box.size[:axes], strict=True)
        )
        for place in product(*spans):
            yield from self.chunks.get((key, place), ())

    def _window(self, key: str, box: Box) -> torch.Tensor | None:
        """A box that lies in one chunk, as one piece of it; None if it does not."""
        for chunk in self._near(key, box):
            inner, overlap = _overlap(chunk, box)
            if overlap == box.size:
                count = math.prod(box.size)
                strides = _strides(chunk.size)
                last = sum(
                    (size - 1) * stride for size, stride in zip(box.size, strides, strict=True)
                )
                return self._numbers(chunk, inner, count, strides) if last == count - 1 else None
        return None

    def _copy(self, chunk: Chunk, box: Box, out: torch.Tensor) -> int:
        """Copy what a chunk has of a box into `out`, of the box's size; how many numbers it was."""
        inner, size = _overlap(chunk, box)
        if not size:
            return 0
        strides = _strides(chunk.size)
        span = 1 + sum((length - 1) * stride for length, stride in zip(size, strides, strict=True))
        there = self._numbers(chunk, inner, span, strides).as_strided(size, strides)
        at = [
            at + first - start
            for at, first, start in zip(inner, chunk.offset, box.offset, strict=True)
        ]
        out[
            tuple(slice(start, start + length) for start, length in zip(at, size, strict=True))
        ].copy_(there)
        return math.prod(size)

    def _numbers(
        self, chunk: Chunk, inner: tuple[int, ...], count: int, strides: tuple[int, ...]
    ) -> torch.Tensor:
        """`count` numbers of a chunk from the place `inner` in it on."""
        dtype = self.dtypes[chunk.key]
        first = sum(at * stride for at, stride in zip(inner, strides, strict=True))
        if chunk not in self.data:
            self.data[chunk] = _data_offset(chunk, dtype)
        try:
            return map_tensor(
                chunk.path, self.data[chunk] + first * dtype.itemsize, (count,), dtype
            )
        except OSError as error:
            raise UserError(f"{chunk.path} cannot be read ({error.strerror})") from None


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


def _overlap(chunk: Chunk, box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(where in the chunk, of what size) the part lies that a box has of it; sizes () if none."""
    starts = [max(a, b) for a, b in zip(chunk.offset, box.offset, strict=True)]
    stops = [
        min(a + m, b + n) for a, m, b, n in zip(chunk.offset, chunk.size, box.offset, box.size, strict=True)
    ]  # fmt: skip
    size = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    if any(length <= 0 for length in size):
        return (), ()
    return tuple(start - at for start, at in zip(starts, chunk.offset, strict=True)), size


def _data_offset(chunk: Chunk, dtype: torch.dtype) -> int:
    """The byte of a file at which a chunk's numbers begin. UserError if they are not as the index says."""
    with safe.reading(chunk.path) as file:
        archive = Archive(file, chunk.start, chunk.length)
        there = archive.numbers(archive.tree())
    plain = zip(there.size, there.stride, _strides(there.size), strict=True)
    together = all(n == 1 or stride == expected for n, stride, expected in plain)
    expected = (chunk.size, dtype, math.prod(chunk.size) * dtype.itemsize)
    if there.offset or not together or (there.size, there.dtype, there.length) != expected:
        raise UserError(
            f"{chunk.path} is damaged: a part of {chunk.key} is not what the index says"
        )
    return there.start
