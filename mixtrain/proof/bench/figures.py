"""Computes figures from readings: medians, paired ratios, confidence intervals. No torch.

Rule: a ratio compares two turns of one round, which are close in time; the figure is the median
over rounds. On a shared machine two medians over the whole time would compare different loads. If
at least ENOUGH rounds were quiet, only those count; the report shows how many they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from mixtrain.proof.bench.background_load import QUIET
from mixtrain.proof.bench.reading import Reading

CONFIDENCE = 0.95
ENOUGH = 6  # with fewer rounds there is no interval of this confidence
FLOPS = ("flops_causal", "flops_whole")


@dataclass(frozen=True)
class Ratio:
    """The median over rounds, and a distribution-free CONFIDENCE interval for the true median."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Figures:
    """The figures of one variant. Bytes are the maximum over rounds."""

    row: str
    variant: str
    rounds: int
    quiet_rounds: int  # rounds with at most QUIET CPUs kept busy by other processes in every turn
    rate: float  # amount per second, median
    unit: str
    seconds: float  # per turn, median
    ratio: Ratio | None  # the first variant's rate / this variant's; None for the first itself
    cpu_ratio: Ratio | None  # the same for the amount per second of CPU time
    ranks: int
    peak_bytes: int | None
    held_bytes: int | None
    state_bytes: int | None
    flops_causal: float | None
    flops_whole: float | None


def figures(readings: Iterable[Reading]) -> list[Figures]:
    """Return the figures of every row and variant, in the order of the readings."""
    rows: dict[str, list[Reading]] = {}
    for reading in readings:
        rows.setdefault(reading.row, []).append(reading)
    return [figure for row in rows.values() for figure in _row(row)]


def _row(readings: list[Reading]) -> Iterator[Figures]:
    rounds = {reading.round for reading in readings}
    quiet = rounds - {reading.round for reading in readings if reading.others > QUIET}
    counted = quiet if len(quiet) >= ENOUGH else rounds
    variants: dict[str, list[Reading]] = {}
    for reading in readings:
        if reading.round in counted:
            variants.setdefault(reading.variant, []).append(reading)
    for name in variants:
        yield _figures(name, variants, len(rounds), len(quiet))


def _figures(name: str, variants: dict[str, list[Reading]], rounds: int, quiet: int) -> Figures:
    first = next(iter(variants.values()))
    second = variants[name]
    paired = [] if second is first else pairs(first, second)
    peaks = [reading.peak_bytes for reading in second if reading.peak_bytes is not None]
    constant_keys = ("unit", "ranks", "held_bytes", "state_bytes", *FLOPS)
    constants = {key: getattr(second[0], key) for key in constant_keys}
    return Figures(
        second[0].row,
        name,
        rounds=rounds,
        quiet_rounds=quiet,
        rate=median(rate(reading) for reading in second),
        seconds=median(reading.seconds for reading in second),
        ratio=ratio([rate(a) / rate(b) for a, b in paired]) if paired else None,
        cpu_ratio=ratio([cpu_rate(a) / cpu_rate(b) for a, b in paired]) if paired else None,
        peak_bytes=max(peaks) if peaks else None,
        **constants,
    )


def rate(reading: Reading) -> float:
    return reading.amount / reading.seconds


def cpu_rate(reading: Reading) -> float:
    return reading.amount / reading.cpu_seconds


def pairs(first: list[Reading], second: list[Reading]) -> list[tuple[Reading, Reading]]:
    """Return the pairs of readings of the same round."""
    of_round = {reading.round: reading for reading in second}
    return [(reading, of_round[reading.round]) for reading in first if reading.round in of_round]


def ratio(values: list[float]) -> Ratio:
    """Return the median and the sign test's interval, bounded by two order statistics.

    The interval is the narrowest one that misses the true median with a probability of at most
    1 - CONFIDENCE. With fewer than six values there is none, and all values are the interval.
    """
    ordered = sorted(values)
    count = len(values)

    def miss_probability(cut: int) -> float:
        """Return how often the true median is outside after removing `cut` values at each end."""
        return 2 * sum(math.comb(count, number) for number in range(cut + 1)) / 2**count

    allowed = [cut for cut in range((count + 1) // 2) if miss_probability(cut) <= 1 - CONFIDENCE]
    cut = max(allowed, default=0)
    return Ratio(median(ordered), ordered[cut], ordered[count - 1 - cut])
