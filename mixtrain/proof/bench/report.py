"""How a benchmark reads in a terminal: a table a row, made of nothing but readings and facts. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import rich.box
from rich.table import Table

from mixtrain.proof.bench.figures import ENOUGH, Figures, figures
from mixtrain.proof.bench.machine import peak_tflops
from mixtrain.proof.bench.reading import Reading
from mixtrain.system.console import Console

GIB = 2**30
WIDTH = 100
UNITS = {
    "tokens": ("tokens/s", 1, ",.0f"),
    "bytes": ("GB/s", 1e-9, ".2f"),
    "runs": ("s", None, ".2f"),
}


def show(facts: dict[str, str], readings: Iterable[Reading]) -> None:
    """Print the facts, a table for each row, and what the columns mean."""
    console = Console(width=WIDTH, highlight=False, markup=False)
    for name, value in facts.items():
        console.print(f"{name:<9} {value}")
    rows: dict[str, list[Figures]] = {}
    for figure in figures(readings):
        rows.setdefault(figure.row, []).append(figure)
    for row, found in rows.items():
        console.print(f"\n{row}: {_rounds(found[0])}")
        console.print(_table(found, facts.get("gpu")))
    console.print()
    for line in legend(facts, [figure for found in rows.values() for figure in found]):
        console.print(line)


def _table(found: list[Figures], gpu: str | None) -> Table:
    unit, scale, form = UNITS[found[0].unit]
    first = found[0].variant
    columns = {
        unit: [f"{figure.rate * scale if scale else figure.seconds:{form}}" for figure in found],
        f"{first} / this": [str(figure.ratio or "") for figure in found],
        "CPU time": [
            f"{figure.cpu_ratio.median:.2f}" if figure.cpu_ratio else "" for figure in found
        ],
        "peak": [_gib(figure.peak_bytes) for figure in found],
        "state": [_gib(figure.held_bytes) for figure in found],
        "planned": [_gib(figure.state_bytes) for figure in found],
    }
    if gpu:
        columns |= {
            "TF/s": [_tflops(figure, figure.flops_causal) for figure in found],
            "whole": [_tflops(figure, figure.flops_whole) for figure in found],
            "MFU": [_mfu(figure, peak_tflops(gpu)) for figure in found],
        }
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True, min_width=13)
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for number, figure in enumerate(found):
        table.add_row(figure.variant, *(cells[number] for cells in shown.values()))
    return table


def _rounds(figure: Figures) -> str:
    rounds = (
        f"{figure.rounds} round{'s' * (figure.rounds > 1)}, {figure.quiet_rounds} of them on"
        " a quiet machine"
    )
    return f"{rounds}: {'these' if figure.quiet_rounds >= ENOUGH else 'all'} count"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / GIB:.2f}"


def _tflops(figure: Figures, flops: float | None) -> str:
    """A rank, that is a GPU."""
    if not flops:
        return ""
    tflops = figure.rate * flops / figure.ranks / 1e12
    return f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.3f}"


def _mfu(figure: Figures, peak: int | None) -> str:
    if peak is None or not figure.flops_whole:
        return ""
    return f"{figure.rate * figure.flops_whole / figure.ranks / 1e12 / peak:.1%}"


def legend(facts: dict[str, str], found: list[Figures]) -> Iterator[str]:
    """What the columns mean, in lines of a terminal."""
    yield (
        "speed: median over rounds; ratio: median of those within a round (95% interval); CPU"
        " time: that"
    )
    yield "of work per second of CPU time, which others on the machine disturb less"
    if any(figure.held_bytes for figure in found):
        yield (
            "peak, state: GiB on the fullest rank within steps and of what lives on between"
            " them; planned:"
        )
        yield "that state by the plan"
    if "gpu" in facts:
        yield (
            "TF/s: TFLOP/s a GPU, 6 a weight and token and the causal half of attention's"
            " scores; whole: all of"
        )
        yield (
            "the scores, as in Megatron-Core's published figures. What is recomputed is not"
            " counted."
        )
        if peak := peak_tflops(facts["gpu"]):
            yield f"MFU: whole over the dense bf16 peak of {peak} TFLOP/s"
