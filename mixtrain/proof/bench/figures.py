"""From readings to figures: medians, ratios pair by pair, and how sure a median is. No torch.

Rule: a ratio is taken within a round, of two turns one shortly after the other, and then the median
over rounds: on a machine that others use too, two medians of the whole time would compare two
different machines. Where ENOUGH rounds were quiet, the figures are theirs alone; how many they were
is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from mixtrain.proof.bench.background_load import QUIET
from mixtrain.proof.bench.reading import Reading

CONFIDENCE = 0.95
ENOUGH = 6  # below it there is no such interval
FLOPS = ("flops_causal", "flops_whole")


@dataclass(frozen=True)
class Ratio:
    """The median over rounds, and an interval that has the true median with CONFIDENCE, whatever the distribution."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Figures:
    """What is said of one variant. Bytes are the most of all rounds."""

    row: str
    variant: str
    rounds: int
    quiet_rounds: int  # in which others kept fewer than QUIET CPUs busy in every turn
    rate: float  # amounts a second: the median
    unit: str
    seconds: float  # a turn: the median
    ratio: Ratio | None  # the first variant's rate over this one's; null for the first itself
    cpu_ratio: Ratio | None  # the same of amounts a second of CPU time
    ranks: int
    peak_bytes: int | None
    held_bytes: int | None
    state_bytes: int | None
    flops_causal: float | None
    flops_whole: float | None


def figures(readings: Iterable[Reading]) -> list[Figures]:
    """Of every row and variant, in the order of the readings."""
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
    own = variants[name]
    peaks = [reading.peak_bytes for reading in own if reading.peak_bytes is not None]
    same = {
        key: getattr(own[0], key) for key in ("unit", "ranks", "held_bytes", "state_bytes", *FLOPS)
    }
    return Figures(
        own[0].row,
        name,
        rounds=rounds,
        quiet_rounds=quiet,
        rate=median(rate(reading) for reading in own),
        seconds=median(reading.seconds for reading in own),
        ratio=None if own is first else ratio([rate(a) / rate(b) for a, b in pairs(first, own)]),
        cpu_ratio=None
        if own is first
        else ratio([cpu_rate(a) / cpu_rate(b) for a, b in pairs(first, own)]),
        peak_bytes=max(peaks) if peaks else None,
        **same,
    )


def rate(reading: Reading) -> float:
    return reading.amount / reading.seconds


def cpu_rate(reading: Reading) -> float:
    return reading.amount / reading.cpu_seconds


def pairs(first: list[Reading], second: list[Reading]) -> list[tuple[Reading, Reading]]:
    """The turns of the same rounds."""
    of_round = {reading.round: reading for reading in second}
    return [(reading, of_round[reading.round]) for reading in first if reading.round in of_round]


def ratio(values: list[float]) -> Ratio:
    """The sign test's interval: the widest pair of order statistics that leaves out at most 1 - CONFIDENCE.

    With fewer than six values there is none so sure, and it is all of them.
    """
    ordered = sorted(values)
    count = len(values)

    def left_out(cut: int) -> float:
        """How often the true median lies outside of the values that are left when `cut` are cut off at each end."""
        return 2 * sum(math.comb(count, number) for number in range(cut + 1)) / 2**count

    cut = max(
        (cut for cut in range((count + 1) // 2) if left_out(cut) <= 1 - CONFIDENCE), default=0
    )
    return Ratio(median(ordered), ordered[cut], ordered[count - 1 - cut])
