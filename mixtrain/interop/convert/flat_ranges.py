"""Where the elements of each Hugging Face tensor lie in Megatron-Core's unsharded tensors.

Rule: both directions copy the same contiguous ranges. They are derived from the views of
tensor_mapping.py; this module knows no tensor name and no layout.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.schema import Config
from mixtrain.interop.convert.tensor_mapping import MappedSlice, mapped_slices


class FlatRange(NamedTuple):
    """`count` elements that are contiguous and in the same order in both flattened tensors."""

    name: str  # Hugging Face tensor
    hf_start: int
    key: str  # Megatron tensor
    megatron_start: int
    count: int


HF_START = FlatRange._fields.index("hf_start")
MEGATRON_START = FlatRange._fields.index("megatron_start")


class RangeIndex(NamedTuple):
    """All ranges of a model, by Megatron key and by Hugging Face name, sorted by their start."""

    by_key: dict[str, list[FlatRange]]
    by_name: dict[str, list[FlatRange]]
    megatron_shapes: dict[str, tuple[int, ...]]
    hf_shapes: dict[str, tuple[int, ...]]  # in the order of a file on the hub


def build_index(config: Config, layout: str, hf_vocab_size: int | None = None) -> RangeIndex:
    """Return the ranges of a resolved Config's model in a layout, `hub` or `fused`.

    `hf_vocab_size`: rows of the Hugging Face embedding, if the Megatron one is padded. No range
    covers the padding.
    """
    shapes = tensor_schema.shapes(config)
    index = RangeIndex({key: [] for key in shapes}, {}, shapes, {})
    slices = mapped_slices(config, layout, hf_vocab_size)
    for mapped in sorted(slices, key=_file_order(list(shapes))):
        index.hf_shapes.update(mapped.hf_shapes())
        for flat_range in flat_ranges(mapped, shapes[mapped.key]):
            index.by_key[flat_range.key].append(flat_range)
            index.by_name.setdefault(flat_range.name, []).append(flat_range)
    for ranges in index.by_key.values():
        ranges.sort(key=lambda flat_range: flat_range.megatron_start)
    return index


def _file_order(keys: list[str]) -> Callable[[MappedSlice], tuple]:
    """Return a sort key for the order of files on the hub: embedding, layer by layer, final norm.

    The sort is stable: within a layer, slices stay in the order of mapped_slices.
    """
    after_layers = set(keys[keys.index("decoder.final_layernorm.weight") :])

    def sort_key(mapped: MappedSlice) -> tuple:
        in_layer = mapped.key.startswith(tensor_schema.LAYER)
        return mapped.key in after_layers, mapped.stack_index[:1] if in_layer else ()

    return sort_key


def flat_ranges(mapped: MappedSlice, shape: tuple[int, ...]) -> Iterator[FlatRange]:
    """Yield the fewest ranges of a slice of a Megatron tensor of `shape`."""
    slice_number = 0
    for size, number in zip(shape, mapped.stack_index, strict=False):
        slice_number = slice_number * size + number
    slice_start = slice_number * math.prod(mapped.shape)
    for name, view in mapped.views(torch.empty(mapped.shape, device="meta")).items():
        # the trailing axes of the view that are contiguous in the slice make one range
        axes = view.dim()
        count = 1
        while axes and view.stride(axes - 1) == count:
            axes -= 1
            count *= view.shape[axes]
        start = slice_start + view.storage_offset()
        for number, place in enumerate(product(*map(range, view.shape[:axes]))):
            offset = sum(at * stride for at, stride in zip(place, view.stride(), strict=False))
            yield FlatRange(name, number * count, mapped.key, start + offset, count)


def overlapping(
    ranges: list[FlatRange], start: int, stop: int, side: int
) -> Iterator[tuple[FlatRange, int, int]]:
    """Yield the ranges that hold elements start..stop of a flattened tensor.

    Each comes with the start and stop of those elements, relative to the range. `side` is HF_START
    or MEGATRON_START: the tensor that start..stop refer to. `ranges` are sorted by `side` and
    without gaps.
    """
    first = bisect_right(ranges, start, key=lambda flat_range: flat_range[side]) - 1
    for flat_range in ranges[first:]:
        low = max(start - flat_range[side], 0)
        high = min(stop - flat_range[side], flat_range.count)
        if low >= high:
            return
        yield flat_range, low, high
