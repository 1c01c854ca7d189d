"""What a figure is worth nothing without: the machine, the versions, the commit. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine")
# Dense bf16 peak in TFLOP/s by a word of the GPU's name (NVIDIA's data sheets, without sparsity).
PEAKS = {"H100": 989, "H200": 989, "A100": 312}


def facts() -> dict[str, str]:
    return {
        "machine": _cpu(),
        **({"gpu": gpu} if (gpu := _gpu()) else {}),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(
            f"{name} {version}" for name in PACKAGES if (version := _version(name))
        ),
        "commit": _commit(),
    }


def peak_tflops(gpu: str) -> int | None:
    """Where it is one of PEAKS."""
    return next((peak for word, peak in PEAKS.items() if word in gpu), None)


def _cpu() -> str:
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        name = platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {name}, {memory:.0f} GiB"


def _gpu() -> str | None:
    try:
        asked = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version",
            "--format=csv,noheader",
        ]
        return subprocess.run(
            asked, capture_output=True, text=True, timeout=30, check=True
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            asked, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
