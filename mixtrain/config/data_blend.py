"""What data.data_path and data.split say: prefixes with their weights, and which documents each part has. No torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

from mixtrain.errors import UserError


def parse_blend(data_path: list[str]) -> tuple[list[str], list[float] | None]:
    """The prefixes of Megatron's data list and their weights, or None where it names prefixes alone."""
    entries = [str(entry).strip() for entry in data_path or ()]
    if not entries:
        raise UserError(
            'data.data_path is empty; give a prefix, or weights and prefixes: ["0.3", "a", "0.7",'
            ' "b"]'
        )
    weights = [_number(entry) for entry in entries[::2]]
    if all(weight is None for weight in map(_number, entries)):
        return entries, None
    if (
        len(entries) % 2
        or None in weights
        or any(_number(entry) is not None for entry in entries[1::2])
    ):
        raise UserError(
            f"data.data_path = {entries} mixes weights and prefixes out of step; "
            'give every prefix its weight before it: ["0.3", "a", "0.7", "b"]'
        )
    for weight, prefix in zip(weights, entries[1::2], strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"data.data_path: the weight {weight} of {prefix} must be above 0; leave the"
                " prefix out"
            )
    return entries[1::2], weights


def named_twice(data: dict[str, Hashable], prefixes: list[str]) -> Iterator[str]:
    """What is wrong where two of the prefixes stand for the same data, by what each stands for."""
    first: dict[Hashable, str] = {}
    for prefix in prefixes:
        if (before := first.get(data[prefix])) is not None:
            yield (
                f"data.data_path has {before} and {prefix}, which are the same data: its samples"
                " would be trained on twice; leave one out, and give weights where one is to be"
                " read more often"
            )
        first.setdefault(data[prefix], prefix)


def split_weights(split: str) -> list[float]:
    """The parts of train, valid and test in "90,5,5". Raises UserError."""
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if (
        len(weights) != 3
        or not all(0 <= weight < math.inf for weight in weights)
        or weights[0] == 0
    ):
        raise UserError(
            f'data.split = "{split}" must be three numbers, the first above 0, as in "90,5,5"'
        )
    return weights


def split_ranges(documents: int, split: str) -> list[tuple[int, int]]:
    """The documents [begin, end) of train, valid and test, as Megatron's builder cuts them. Raises UserError."""
    weights = split_weights(split)
    ends = [0.0]
    for weight in weights:
        ends.append(ends[-1] + weight / sum(weights))
    bounds = [int(round(end * float(documents))) for end in ends]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None
