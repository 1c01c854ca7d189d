"""Prints a benchmark's readings in a terminal, one table per row. No torch."""

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


def show(info: dict[str, str], readings: Iterable[Reading]) -> None:
    """Print the machine's info, a table for each row, and a legend of the columns."""
    console = Console(width=WIDTH, highlight=False, markup=False)
    for name, value in info.items():
        console.print(f"{name:<9} {value}")
    rows: dict[str, list[Figures]] = {}
    for figure in figures(readings):
        rows.setdefault(figure.row, []).append(figure)
    for row, variants in rows.items():
        console.print(f"\n{row}: {_rounds(variants[0])}")
        console.print(_table(variants, info.get("gpu")))
    console.print()
    for line in legend(info, [figure for variants in rows.values() for figure in variants]):
        console.print(line)


def _table(variants: list[Figures], gpu: str | None) -> Table:
    unit, scale, form = UNITS[variants[0].unit]
    first = variants[0].variant
    speeds = [figure.rate * scale if scale else figure.seconds for figure in variants]
    cpu_ratios = [figure.cpu_ratio for figure in variants]
    columns = {
        unit: [f"{speed:{form}}" for speed in speeds],
        f"{first} / this": [str(figure.ratio or "") for figure in variants],
        "CPU time": [f"{ratio.median:.2f}" if ratio else "" for ratio in cpu_ratios],
        "peak": [_gib(figure.peak_bytes) for figure in variants],
        "state": [_gib(figure.held_bytes) for figure in variants],
        "planned": [_gib(figure.state_bytes) for figure in variants],
    }
    if gpu:
        columns |= {
            "TF/s": [_tflops(figure, figure.flops_causal) for figure in variants],
            "whole": [_tflops(figure, figure.flops_whole) for figure in variants],
            "MFU": [_mfu(figure, peak_tflops(gpu)) for figure in variants],
        }
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True, min_width=13)
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for number, figure in enumerate(variants):
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
    """Return TFLOP/s per rank, that is per GPU."""
    if not flops:
        return ""
    tflops = figure.rate * flops / figure.ranks / 1e12
    return f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.3f}"


def _mfu(figure: Figures, peak: int | None) -> str:
    if peak is None or not figure.flops_whole:
        return ""
    return f"{figure.rate * figure.flops_whole / figure.ranks / 1e12 / peak:.1%}"


def legend(info: dict[str, str], figures_shown: list[Figures]) -> Iterator[str]:
    """Yield the lines that explain the columns."""
    yield "speed: median over rounds; ratio: median of the ratios within a round (95% interval);"
    yield "CPU time: ratio of work per CPU second, less disturbed by other processes of the machine"
    if any(figure.held_bytes for figure in figures_shown):
        yield "peak, state: maximum GiB of a rank during steps, and between steps; planned: the"
        yield "state according to the plan"
    if "gpu" in info:
        yield "TF/s: TFLOP/s per GPU, 6 per weight and token plus the causal half of attention's"
        yield "scores; whole: with all scores, as in Megatron-Core's published figures."
        yield "Recomputation is not counted."
        if peak := peak_tflops(info["gpu"]):
            yield f"MFU: whole / dense bf16 peak of {peak} TFLOP/s"
