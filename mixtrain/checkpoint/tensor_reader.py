"""Read any slice of a checkpoint's tensors, whatever layout wrote them; memory-mapped if possible.

Rule: a stored chunk's shape is compared with the index, and its bytes are located in the zip file
that torch.save wrote (archive.py). Needs no process group and never loads a complete tensor.
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
from mixtrain.checkpoint.slices import TensorSlice, slices_of_range
from mixtrain.errors import UserError
from mixtrain.system.mmap_tensor import map_tensor


class StoredChunk(NamedTuple):
    """A slice of a tensor as one record of a file."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    path: Path
    start: int  # bytes: its zip file within the file
    length: int  # bytes


class TensorReader:
    """Reads the tensors of one checkpoint directory."""

    def __init__(self, directory: Path):
        """Read the index. UserError if it is missing or damaged."""
        metadata = safe.read_metadata(directory)
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        # key -> the number of leading axes along which every chunk has size 1
        self.single_axes: dict[str, int] = {}
        # (key, offset along these axes) -> chunks
        self.chunks: dict[tuple, list[StoredChunk]] = {}
        self.data_offsets: dict[StoredChunk, int] = {}  # bytes: of a chunk's data within its file
        for key, metadata_of_key in metadata.state_dict_metadata.items():
            if isinstance(metadata_of_key, TensorStorageMetadata):
                self._add(key, metadata_of_key, metadata.storage_data)

    def _add(self, key: str, tensor: TensorStorageMetadata, storage: dict) -> None:
        self.shapes[key] = tuple(tensor.size)
        self.dtypes[key] = tensor.properties.dtype
        axes = 0
        while axes < len(tensor.size) and all(chunk.sizes[axes] == 1 for chunk in tensor.chunks):
            axes += 1
        self.single_axes[key] = axes
        for chunk in tensor.chunks:
            stored = storage[MetadataIndex(key, chunk.offsets)]
            path = self.directory / stored.relative_path
            offset = tuple(chunk.offsets)
            self.chunks.setdefault((key, offset[:axes]), []).append(
                StoredChunk(key, offset, tuple(chunk.sizes), path, stored.offset, stored.length)
            )

    def files(self, keys: Iterable[str]) -> set[str]:
        """Return the names of the files that store these tensors."""
        wanted = set(keys)
        return {
            chunk.path.name
            for (key, _), chunks in self.chunks.items()
            if key in wanted
            for chunk in chunks
        }

    def at(self, key: str, numbers: tuple[int, ...] = ()) -> torch.Tensor:
        """Return tensor[numbers]: the slice at these indices of the first axes, or all of it."""
        shape = self.shapes[key]
        row = 0
        for size, number in zip(shape, numbers, strict=False):
            row = row * size + number
        inner = shape[len(numbers) :]
        count = math.prod(inner)
        return self.flat(key, row * count, (row + 1) * count).view(inner)

    def flat(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return elements start..stop of the flattened tensor: mapped if contiguous, else copied.

        UserError if no file stores some of them.
        """
        slices = list(slices_of_range(self.shapes[key], start, stop))
        if len(slices) == 1 and (mapped := self._map(key, slices[0])) is not None:
            return mapped
        out = torch.empty(stop - start, dtype=self.dtypes[key])
        filled = 0
        for wanted in slices:
            target = out[wanted.start - start : wanted.stop - start].view(wanted.size)
            filled += sum(
                self._copy(chunk, wanted, target) for chunk in self._candidates(key, wanted)
            )
        if filled != stop - start:
            raise UserError(
                f"{self.directory}: {key} has a hole: {stop - start - filled:,} numbers lie in no"
                " file"
            )
        return out

    def contiguous_stop(self, key: str, start: int, most: int) -> int:
        """Return where the elements stop that follow `start` in one chunk; at most start + `most`.

        If a chunk stores parts of rows, this is start + `most`: `flat` copies those elements.
        """
        shape = self.shapes[key]
        axes = self.single_axes[key]
        index = numpy.unravel_index(start, shape)
        for chunk in self.chunks.get((key, tuple(map(int, index[:axes]))), ()):
            inside = all(
                at <= number < at + size
                for at, number, size in zip(chunk.offset, index, chunk.size, strict=True)
            )
            if inside and chunk.size[axes + 1 :] == shape[axes + 1 :]:
                first = sum(
                    at * stride for at, stride in zip(chunk.offset, _strides(shape), strict=True)
                )
                return min(start + most, first + math.prod(chunk.size))
        return start + most

    def _candidates(self, key: str, wanted: TensorSlice) -> Iterator[StoredChunk]:
        """Yield the chunks that may overlap a slice."""
        axes = self.single_axes[key]
        ranges = (
            range(at, at + size)
            for at, size in zip(wanted.offset[:axes], wanted.size[:axes], strict=True)
        )
        for offset in product(*ranges):
            yield from self.chunks.get((key, offset), ())

    def _map(self, key: str, wanted: TensorSlice) -> torch.Tensor | None:
        """Return a slice, memory-mapped; None if it is not contiguous in one chunk."""
        for chunk in self._candidates(key, wanted):
            offset, size = _overlap(chunk, wanted)
            if size == wanted.size:
                strides = _strides(chunk.size)
                count = math.prod(size)
                return self._window(chunk, offset, count) if _span(size, strides) == count else None
        return None

    def _copy(self, chunk: StoredChunk, wanted: TensorSlice, out: torch.Tensor) -> int:
        """Copy the overlap of a chunk and a slice into `out`, of the slice's size; its elements."""
        offset, size = _overlap(chunk, wanted)
        if not size:
            return 0
        strides = _strides(chunk.size)
        source = self._window(chunk, offset, _span(size, strides)).as_strided(size, strides)
        starts = [
            at + first - start
            for at, first, start in zip(offset, chunk.offset, wanted.offset, strict=True)
        ]
        target = tuple(slice(at, at + length) for at, length in zip(starts, size, strict=True))
        out[target].copy_(source)
        return math.prod(size)

    def _window(self, chunk: StoredChunk, offset: tuple[int, ...], count: int) -> torch.Tensor:
        """Map `count` consecutive elements of a chunk, from the index `offset` in it."""
        dtype = self.dtypes[chunk.key]
        first = sum(at * stride for at, stride in zip(offset, _strides(chunk.size), strict=True))
        if chunk not in self.data_offsets:
            self.data_offsets[chunk] = _data_offset(chunk, dtype)
        start = self.data_offsets[chunk] + first * dtype.itemsize
        try:
            return map_tensor(chunk.path, start, (count,), dtype)
        except OSError as error:
            raise UserError(f"{chunk.path} cannot be read ({error.strerror})") from None


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


def _span(size: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of elements from the first to the last of a strided slice, inclusive."""
    return 1 + sum((length - 1) * stride for length, stride in zip(size, strides, strict=True))


def _overlap(chunk: StoredChunk, wanted: TensorSlice) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (offset within the chunk, size) of the overlap of both; ((), ()) if there is none."""
    axes = list(zip(chunk.offset, chunk.size, wanted.offset, wanted.size, strict=True))
    starts = [max(at, wanted_at) for at, _, wanted_at, _ in axes]
    stops = [min(at + n, wanted_at + wanted_n) for at, n, wanted_at, wanted_n in axes]
    size = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    if any(length <= 0 for length in size):
        return (), ()
    return tuple(start - at for start, at in zip(starts, chunk.offset, strict=True)), size


def _data_offset(chunk: StoredChunk, dtype: torch.dtype) -> int:
    """Return the byte of the file where a chunk's data begin. UserError if the index differs."""
    with safe.reading(chunk.path) as file:
        archive = Archive(file, chunk.start, chunk.length)
        stored = archive.locate(archive.tree())
    strides = zip(stored.size, stored.stride, _strides(stored.size), strict=True)
    contiguous = all(n == 1 or stride == expected for n, stride, expected in strides)
    expected = (chunk.size, dtype, math.prod(chunk.size) * dtype.itemsize)
    actual = (stored.size, stored.dtype, stored.length)
    if stored.offset or not contiguous or actual != expected:
        raise UserError(f"{chunk.path} is damaged: a chunk of {chunk.key} differs from the index")
    return stored.start
