"""One turn of one variant, as a line of a CSV file. No torch.

Rule: a line has all that its figures need; what is the same for all lines (machine, versions,
commit) stands above them as `# name: value`.
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
    """Bytes are those of the fullest rank; null where there are none."""

    row: str
    round: int
    variant: str
    seconds: float  # of the slowest rank
    # of all ranks and their threads together: what it costs where others use the machine too
    cpu_seconds: float
    amount: float
    unit: str  # of the amount: tokens, bytes, runs
    others: float  # CPUs that other processes of the machine kept busy meanwhile
    ranks: int = 1
    peak_bytes: int | None = None
    held_bytes: int | None = None  # between steps
    state_bytes: int | None = None  # what the plan says of that
    flops_causal: float | None = None  # a token: costs.training_flops
    flops_whole: float | None = None


def write(path: Path, facts: dict[str, str], readings: Iterable[Reading]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(
            file, [field.name for field in fields(Reading)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(
            {name: _text(value) for name, value in asdict(reading).items()} for reading in readings
        )


def _text(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> tuple[dict[str, str], list[Reading]]:
    """The facts and the readings of a file that `write` wrote. UserError if it is none."""
    try:
        lines = path.read_text().splitlines()
        facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
        rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
        return facts, [_reading(row) for row in rows]
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
