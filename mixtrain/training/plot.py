"""report.png: the loss curve and the experts' load, from metrics.jsonl alone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy

from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import Count, InvalidJson


class PlotRecord(TypedDict):
    """The fields of a line of metrics.jsonl that are drawn."""

    step: Count
    lm_loss: NotRequired[float | None]
    val_loss: NotRequired[float | None]
    tokens_per_expert: NotRequired[list[list[Count]]]


def draw(run_dir: str | Path, title: str, entropy: float | None = None) -> Path:
    """Draw report.png from the run's metrics.jsonl; return its path.

    `entropy`: unigram entropy of the validation tokens in nats.
    """
    # not pyplot, which imports twice as slowly and looks for a display
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    directory = Path(run_dir)
    records = read(directory / "metrics.jsonl")
    steps = [record for record in records if "lm_loss" in record and "tokens_per_expert" in record]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, records, entropy)
    image = right.imshow(_load(steps), aspect="auto", cmap="viridis", vmin=0)
    right.set(
        xlabel="expert",
        ylabel="layer",
        title="tokens of an expert over the even share, end of the run",
    )
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=right)
    figure.suptitle(title)
    figure.savefig(directory / "report.png", dpi=110)
    return directory / "report.png"


def read(metrics: Path) -> list[PlotRecord]:
    """Return the records of a run, skipping other lines (metrics_jsonl.cut_back warns of those)."""
    records = []
    for _, line in untrusted_json.lines(metrics):
        with suppress(InvalidJson):
            records.append(untrusted_json.parse(line, PlotRecord))
    return records


def _losses(axes, records: list[dict], entropy: float | None) -> None:
    for name, label, style in (("lm_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [
            (record["step"], record[name]) for record in records if record.get(name) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    if entropy is not None:
        axes.axhline(entropy, linestyle=":", color="grey", label=f"unigram entropy {entropy:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="loss")
    if axes.lines:
        axes.legend()


def _load(steps: list[dict]) -> numpy.ndarray:
    """Return each expert's tokens over the even share: [layers, experts].

    Pooled over the last tenth of the logged steps.
    """
    tail = [record["tokens_per_expert"] for record in steps[-max(1, len(steps) // 10) :]]
    shape = list(map(len, tail[-1]))
    counts = numpy.sum([load for load in tail if list(map(len, load)) == shape], axis=0)
    return counts / numpy.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
