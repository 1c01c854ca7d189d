"""Readings: one turn of one variant is a line of a CSV file. No torch.

Rule: a line has all values that its figures need. Values common to all lines (machine, versions,
commit) are above them as `# name: value`.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_type_hints

from mixtrain.errors import UserError
from mixtrain.paths import ROOT

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine")


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

    @property
    def rate(self) -> float:
        return self.amount / self.seconds

    @property
    def cpu_rate(self) -> float:
        return self.amount / self.cpu_seconds


def write(path: Path, info: dict[str, str], readings: Iterable[Reading]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in info.items())
        names = [field.name for field in fields(Reading)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for reading in readings:
            values = asdict(reading).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})


def read(path: Path) -> tuple[dict[str, str], list[Reading]]:
    """Return (info, readings) of a file that `write` wrote. UserError for any other file."""
    try:
        lines = path.read_text().splitlines()
        info = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
        rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
        types = get_type_hints(Reading)
        return info, [
            Reading(**{name: _value(types[name], text) for name, text in row.items()})
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not a file of this benchmark's readings: {error}") from None


def _value(kind: type, text: str) -> object:
    if kind is str:
        return text
    if text == "":
        return None
    return int(text) if "int" in str(kind) else float(text)


def machine_info() -> dict[str, str]:
    """Return the machine, the versions of its packages, and the commit."""
    gpu = _output(
        "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
    )
    commit = _output("git", "describe", "--always", "--dirty", "--exclude=*")
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores of"
        f" {cpu.group(1) if cpu else platform.processor()}, {memory:.0f} GiB",
        **({"gpu": gpu.splitlines()[0]} if gpu else {}),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(filter(None, map(_version, PACKAGES))),
        "commit": commit or "not a git checkout",
    }


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """Return what a command prints; "" if it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
