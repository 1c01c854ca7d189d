"""Describes the machine, the package versions and the commit of a benchmark. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from mixtrain.paths import ROOT

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine")
# Dense bf16 peak in TFLOP/s, by part of the GPU's name (NVIDIA's data sheets, without sparsity).
PEAKS = {"H100": 989, "H200": 989, "A100": 312}


def machine_info() -> dict[str, str]:
    gpu = _gpu()
    versions = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    return {
        "machine": _cpu(),
        **({"gpu": gpu} if gpu else {}),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
        "commit": _commit(),
    }


def peak_tflops(gpu: str) -> int | None:
    """Return the peak of a GPU; None if it is not in PEAKS."""
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
        query = "--query-gpu=name,memory.total,driver_version"
        return _output("nvidia-smi", query, "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        return _output("git", "describe", "--always", "--dirty", "--exclude=*").strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def _output(*command: str) -> str:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout
