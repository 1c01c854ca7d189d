"""Readings: one turn of one variant is a line of a CSV file. No torch.

Rule: a line has all values that its figures need. Values common to all lines (machine, versions,
commit) are above them as `# name: value`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from mixtrain.errors import UserError


@dataclass(frozen=True)
class Reading:
    """One turn of one variant. Bytes are the maximum over ranks; None if not measured."""

    row: str
    round: int
    variant: str
    seconds: float  # of the slowest rank
    # of all ranks and threads: less disturbed by other processes than `seconds`
    cpu_seconds: float
    amount: float
    unit: str  # of the amount: tokens, bytes, runs
    others: float  # CPUs that other processes of the machine kept busy during the turn
    ranks: int = 1
    peak_bytes: int | None = None
    held_bytes: int | None = None  # between steps
    state_bytes: int | None = None  # the same according to the plan
    flops_causal: float | None = None  # per token: config.memory.training_flops
    flops_whole: float | None = None


def write(path: Path, info: dict[str, str], readings: Iterable[Reading]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in info.items())
        writer = csv.DictWriter(
            file, [field.name for field in fields(Reading)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(
            {name: _text(value) for name, value in asdict(reading).items()} for reading in readings
        )


def _text(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> tuple[dict[str, str], list[Reading]]:
    """Return (info, readings) of a file that `write` wrote. UserError for any other file."""
    try:
        lines = path.read_text().splitlines()
        info = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
        rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
        return info, [_reading(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not a file of this benchmark's readings: {error}") from None


def _reading(row: dict[str, str]) -> Reading:
    kinds = get_type_hints(Reading)
    return Reading(**{name: _value(kinds[name], text) for name, text in row.items()})


def _value(kind: type, text: str) -> object:
    if kind is str:
        return text
    if text == "":
        return None
    return int(text) if "int" in str(kind) else float(text)
