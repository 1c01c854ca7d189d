"""Prints a benchmark's readings in a terminal, one table per row. No torch.

Rule: a ratio compares two turns of one round, which are close in time. On a shared machine two
medians over the whole time would compare different loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from statistics import median

import rich.box
from rich.table import Table

from mixtrain.proof.bench.readings import Reading
from mixtrain.system.console import Console

WIDTH = 100
UNITS = {
    "tokens": ("tokens/s", 1, ",.0f"),
    "bytes": ("GB/s", 1e-9, ".2f"),
    "runs": ("s", None, ".2f"),
}
# Dense bf16 peak in TFLOP/s, by part of the GPU's name (NVIDIA's data sheets, without sparsity).
PEAKS = {"H100": 989, "H200": 989, "A100": 312}


@dataclass(frozen=True)
class Figures:
    """The readings of one variant, and those of the first variant of its row."""

    taken: list[Reading]
    first: list[Reading]

    def median(self, name: str) -> float:
        return median(map(attrgetter(name), self.taken))

    def ratios(self, name: str) -> list[float]:
        """Return the first variant's value / this one's in each round; [] for the first itself."""
        if self.taken is self.first:
            return []
        value = attrgetter(name)
        of_round = {reading.round: value(reading) for reading in self.taken}
        pairs = [(value(reading), of_round.get(reading.round)) for reading in self.first]
        return [a / b for a, b in pairs if b]

    @property
    def peak_bytes(self) -> int | None:
        """The maximum over rounds."""
        return max((one.peak_bytes for one in self.taken if one.peak_bytes), default=None)

    def tflops(self, name: str) -> float | None:
        """Return TFLOP/s per rank, that is per GPU; None if its FLOPs are not known."""
        flops = getattr(self.taken[0], name)
        return flops and self.median("rate") * flops / self.taken[0].ranks / 1e12


def figures(readings: Iterable[Reading]) -> dict[str, list[Figures]]:
    """Return {row: the figures of its variants}, in the order of the readings."""
    rows: dict[str, dict[str, list[Reading]]] = {}
    for reading in readings:
        rows.setdefault(reading.row, {}).setdefault(reading.variant, []).append(reading)
    return {
        row: [Figures(taken, next(iter(variants.values()))) for taken in variants.values()]
        for row, variants in rows.items()
    }


def show(info: dict[str, str], readings: Iterable[Reading]) -> None:
    """Print the machine's info, a table for each row, and a legend of the columns."""
    console = Console(width=WIDTH, highlight=False, markup=False)
    for name, value in info.items():
        console.print(f"{name:<9} {value}")
    rows = figures(readings)
    for row, variants in rows.items():
        rounds = len({reading.round for reading in variants[0].taken})
        others = max(reading.others for figure in variants for reading in figure.taken)
        console.print(
            f"\n{row}: {rounds} round{'s' * (rounds > 1)}, other processes kept up to"
            f" {others:.1f} CPUs busy"
        )
        console.print(_table(variants, info.get("gpu")))
    console.print()
    has_state = any(figure.taken[0].held_bytes for row in rows.values() for figure in row)
    for line in legend(info.get("gpu"), has_state):
        console.print(line)


def _table(variants: list[Figures], gpu: str | None) -> Table:
    rows = [_cells(figure, gpu) for figure in variants]
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(names[0], no_wrap=True, min_width=13)
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _cells(figure: Figures, gpu: str | None) -> dict[str, str]:
    """Return {column: text}."""
    one = figure.taken[0]
    unit, scale, form = UNITS[one.unit]
    cells = {
        "variant": one.variant,
        unit: f"{figure.median('rate') * scale if scale else figure.median('seconds'):{form}}",
        f"{figure.first[0].variant} / this": _range(figure.ratios("rate")),
        "CPU time": _range(figure.ratios("cpu_rate")).partition(" ")[0],
        "peak": _gib(figure.peak_bytes),
        "state": _gib(one.held_bytes),
        "planned": _gib(one.state_bytes),
    }
    if gpu:
        whole, peak = figure.tflops("flops_whole"), peak_tflops(gpu)
        cells["TF/s"] = _tflops(figure.tflops("flops_causal"))
        cells["whole"] = _tflops(whole)
        cells["MFU"] = f"{whole / peak:.1%}" if whole and peak else ""
    return cells


def _range(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else ""


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def _tflops(tflops: float | None) -> str:
    return "" if not tflops else f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.3f}"


def peak_tflops(gpu: str) -> int | None:
    """Return the peak of a GPU; None if it is not in PEAKS."""
    return next((peak for word, peak in PEAKS.items() if word in gpu), None)


def legend(gpu: str | None, has_state: bool) -> Iterator[str]:
    """Yield the lines that explain the columns."""
    yield "speed: median over rounds; ratio: median of the ratios within a round (their range);"
    yield "CPU time: ratio of work per CPU second, less disturbed by other processes of the machine"
    if has_state:
        yield "peak, state: maximum GiB of a rank during steps, and between steps; planned: the"
        yield "state according to the plan"
    if gpu:
        yield "TF/s: TFLOP/s per GPU, 6 per weight and token plus the causal half of attention's"
        yield "scores; whole: with all scores, as in Megatron-Core's published figures."
        yield "Recomputation is not counted."
        if peak := peak_tflops(gpu):
            yield f"MFU: whole / dense bf16 peak of {peak} TFLOP/s"
