"""Parse data.data_path (prefixes and weights) and data.split (document ranges). No torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

from mixtrain.errors import UserError


def parse_blend(data_path: list[str]) -> tuple[list[str], list[float] | None]:
    """Return (prefixes, weights) of Megatron's data list; None for a list of prefixes only.

    Raises UserError.
    """
    entries = [str(entry).strip() for entry in data_path or ()]
    if not entries:
        raise UserError(
            'data.data_path is empty; give a prefix, or weights and prefixes: ["0.3", "a", "0.7",'
            ' "b"]'
        )
    numbers = [_number(entry) for entry in entries]
    if all(number is None for number in numbers):
        return entries, None
    weights, prefixes = numbers[::2], entries[1::2]
    if len(entries) % 2 or None in weights or any(n is not None for n in numbers[1::2]):
        raise UserError(
            f"data.data_path = {entries} does not alternate weights and prefixes; "
            'give every prefix its weight before it: ["0.3", "a", "0.7", "b"]'
        )
    for weight, prefix in zip(weights, prefixes, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"data.data_path: the weight {weight} of {prefix} must be above 0; leave the"
                " prefix out"
            )
    return prefixes, weights


def duplicate_problems(identity: dict[str, Hashable], prefixes: list[str]) -> Iterator[str]:
    """Yield a problem for each prefix with the `identity` of an earlier one."""
    first: dict[Hashable, str] = {}
    for prefix in prefixes:
        if (earlier := first.get(identity[prefix])) is not None:
            yield (
                f"data.data_path has {earlier} and {prefix}, which are the same data: its samples"
                " would be trained on twice; leave one out, and give weights to read one more often"
            )
        first.setdefault(identity[prefix], prefix)


def split_weights(split: str) -> list[float]:
    """Return the weights of train, valid and test in "90,5,5". Raises UserError."""
    try:
        weights = [float(number) for number in split.split(",")]
    except ValueError:
        weights = []
    valid = len(weights) == 3 and all(0 <= weight < math.inf for weight in weights)
    if not valid or weights[0] == 0:
        raise UserError(
            f'data.split = "{split}" must be three numbers, the first above 0, as in "90,5,5"'
        )
    return weights


def split_ranges(documents: int, split: str) -> list[tuple[int, int]]:
    """Return the documents [begin, end) of train, valid and test, as Megatron's builder does."""
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
