"""What one rank knows of its node, and can tell the others. No torch.

Rule: every fact is looked at here and now, none is taken from the configuration.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil

from mixtrain.config.choices import DataKind
from mixtrain.config.data_blend import parse_blend
from mixtrain.config.plan import Plan
from mixtrain.system.rank_identity import Identity, node_name

ROOT = Path(__file__).resolve().parents[3]
SOURCES = (
    "train.py",
    "mixtrain/**/*.py",
    "mixtrain/config/published_models/*.yaml",
    "conf/**/*.yaml",
    "recipes/*.yaml",
)
LIBRARIES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "numpy",
    "hydra-core",
    "omegaconf",
    "transformers",
)
SEEN_WITHIN_S = 20  # how long a network file system may take to show a file to another node


class Facts(NamedTuple):
    """Of one rank; sizes in bytes. `gpu_*` are those of its own device, 0 on the CPU."""

    rank: int
    local_rank: int
    node: str
    machine: str  # two nodes of Slurm may be one
    commit: str  # "" where git does not say
    source: str  # of the files of the project, whatever git says
    versions: dict[str, str]
    memory_free: int
    gpus: int
    gpu_name: str
    gpu_memory: int
    gpu_free: int
    directories: list[str]  # what is wrong with them, on the first rank of a node
    disk_free: int
    data: dict[str, int]  # path -> size, -1 where it is not there


def gather(plan: Plan, identity: Identity, run_dir: Path, token: str, device: dict) -> Facts:
    """The facts of this rank. `token`: what the first rank has left in run_dir; `device`: fabric.device_facts."""
    first_here = identity.local_rank == 0
    return Facts(
        rank=identity.rank,
        local_rank=identity.local_rank,
        node=node_name(),
        machine=machine(),
        commit=commit(),
        source=source_digest(),
        versions=versions(),
        memory_free=psutil.virtual_memory().available,
        directories=[*directory_problems(plan, run_dir, token)] if first_here else [],
        disk_free=shutil.disk_usage(run_dir).free if run_dir.is_dir() else 0,
        data=data_sizes(plan) if first_here else {},
        **device,
    )


def machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def commit() -> str:
    """The commit that is checked out; "" without git or outside of a checkout, as in a container's image."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def source_digest(root: Path = ROOT) -> str:
    """SHA-256 of the files that make a run: the same commit with a change in it is another source."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern)}):
        digest.update(
            f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest()
        )
    return digest.hexdigest()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def leave_token(run_dir: Path, token: str) -> None:
    """On the first rank: a file that every node must see, else run_dir is another directory there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / token).write_text(token)


def directory_problems(plan: Plan, run_dir: Path, token: str) -> list[str]:
    """What is wrong with the directories that this node writes to."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    found = []
    while not (run_dir / token).exists() and time.monotonic() < deadline:
        os.listdir(run_dir) if run_dir.is_dir() else None  # has a network file system look again
        time.sleep(0.1)
    if not (run_dir / token).exists():
        found.append(
            f"run_dir = {run_dir} is not the directory that the first rank writes to: it must be"
            " shared"
        )
    for key, directory in (
        ("run_dir", run_dir),
        ("data.path_to_cache", Path(plan.config.data.path_to_cache)),
    ):
        if problem := unwritable(directory):
            found.append(f"{key} = {directory} cannot be written: {problem}")
    return found


def unwritable(directory: Path) -> str | None:
    """Why no file can be written there, by writing one."""
    mark = directory / f".preflight_{node_name()}_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mark.write_text("mixtrain\n")
        mark.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def data_sizes(plan: Plan) -> dict[str, int]:
    """Every file of the run's data with its size here."""
    data = plan.config.data
    if data.kind is not DataKind.indexed:
        return {}
    paths = [
        f"{prefix}{end}" for prefix in parse_blend(data.data_path)[0] for end in (".bin", ".idx")
    ]
    paths += [str(path) for path in sorted(Path(data.tokenizer).glob("*")) if path.is_file()]
    return {path: os.path.getsize(path) if os.access(path, os.R_OK) else -1 for path in paths}
