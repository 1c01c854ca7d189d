"""Where every element of a Hugging Face tensor lies in Megatron-Core's whole tensors: table.py as runs of elements.

Rule: both directions copy the same runs, and these are derived from the table's views: what is written here knows no
name and no layout.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.schema import Config
from mixtrain.interop.convert.tensor_mapping import Piece, pieces


class Run(NamedTuple):
    """`count` elements, in their order on both sides: from `start` of the flat Hugging Face tensor `name`, and from
    `place` of the flat Megatron tensor `key`."""

    name: str
    start: int
    key: str
    place: int
    count: int


class Index(NamedTuple):
    """All runs of a model, by the tensors of both sides, in the order of their elements."""

    by_key: dict[str, list[Run]]
    by_name: dict[str, list[Run]]
    shapes: dict[str, tuple[int, ...]]  # of Megatron's tensors
    # shapes of Hugging Face's, in the order in which the model uses them
    names: dict[str, tuple[int, ...]]


def index(config: Config, layout: str, vocabulary: int | None = None) -> Index:
    """The runs of a resolved Config's model in a layout, `hub` or `fused`.

    `vocabulary`: the rows that Hugging Face's tensors have, if not all. No run has the elements of
    the others.
    """
    shapes = tensor_schema.shapes(config)
    found = Index({key: [] for key in shapes}, {}, shapes, {})
    for piece in sorted(pieces(config, layout, vocabulary), key=_position(list(shapes))):
        found.names.update(piece.shapes())
        for run in runs(piece, shapes[piece.key]):
            found.by_key[run.key].append(run)
            found.by_name.setdefault(run.name, []).append(run)
    for several in found.by_key.values():
        several.sort(key=lambda run: run.place)
    return found


def _position(keys: list[str]):
    """Layer after layer, as files on the hub have them: the embedding first, what follows the layers last.

    Within one they stay in the order in which the model uses them, which is that of the pieces.
    """
    last = {key for key in keys[keys.index("decoder.final_layernorm.weight") :]}

    def position(piece: Piece) -> tuple:
        return (
            piece.key in last,
            piece.numbers[:1] if piece.key.startswith(tensor_schema.LAYER) else (),
        )

    return position


def runs(piece: Piece, shape: tuple[int, ...]) -> Iterator[Run]:
    """The runs of a part of a Megatron tensor of `shape`: as few as its views have."""
    base = 0
    for size, number in zip(shape, piece.numbers, strict=False):
        base = base * size + number
    base *= math.prod(piece.shape)
    for name, view in piece.views(torch.empty(piece.shape, device="meta")).items():
        axes = view.dim()
        count = 1
        while axes and view.stride(axes - 1) == count:
            axes -= 1
            count *= view.shape[axes]
        for number, place in enumerate(product(*map(range, view.shape[:axes]))):
            offset = sum(at * stride for at, stride in zip(place, view.stride(), strict=False))
            yield Run(name, number * count, piece.key, base + view.storage_offset() + offset, count)


def overlapping(
    several: list[Run], start: int, stop: int, first: int
) -> Iterable[tuple[Run, int, int]]:
    """(run, its first element, its last + 1) of those that have some of the elements start..stop of a side.

    `first` is the number of the field that is the beginning of a run on that side; several is sorted by it, and has
    every element of the side.
    """
    at = bisect_right(several, start, key=lambda run: run[first]) - 1
    for run in several[at:]:
        low = max(start - run[first], 0)
        high = min(stop - run[first], run.count)
        if low >= high:
            return
        yield run, low, high


PLACE = Run._fields.index("place")
START = Run._fields.index("start")
