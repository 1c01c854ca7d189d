"""What one rank knows about its node and sends to the others. No torch.

Rule: every value is read from the machine now, none from the configuration.
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
from mixtrain.paths import CONF, PACKAGE, ROOT
from mixtrain.system.rank_identity import Identity, node_name

SOURCES = [  # folder, pattern
    (PACKAGE, "**/*.py"),
    (ROOT, "train.py"),
    (CONF, "**/*.yaml"),
    (ROOT, "recipes/*.yaml"),
]
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


class NodeInfo(NamedTuple):
    """One rank's node; sizes in bytes. `gpu_*`: the rank's own device, 0 on the CPU."""

    rank: int
    local_rank: int
    node: str
    machine: str  # two Slurm nodes may share one
    commit: str  # "" if git does not know
    source: str  # digest of the project's files, independent of git
    versions: dict[str, str]
    memory_free: int
    gpus: int
    gpu_name: str
    gpu_memory: int
    gpu_free: int
    directories: list[str]  # their problems; only on the first rank of a node
    disk_free: int
    data: dict[str, int]  # path -> size, -1 if it cannot be read


def collect(plan: Plan, identity: Identity, run_dir: Path, token: str, device: dict) -> NodeInfo:
    """Collect this rank's node information.

    `token`: the file that the first rank wrote to run_dir. `device`: the result of
    network.device_info.
    """
    is_first_of_node = identity.local_rank == 0
    return NodeInfo(
        rank=identity.rank,
        local_rank=identity.local_rank,
        node=node_name(),
        machine=machine(),
        commit=commit(),
        source=source_digest(),
        versions=versions(),
        memory_free=psutil.virtual_memory().available,
        directories=[*directory_problems(plan, run_dir, token)] if is_first_of_node else [],
        disk_free=shutil.disk_usage(run_dir).free if run_dir.is_dir() else 0,
        data=data_sizes(plan) if is_first_of_node else {},
        **device,
    )


def machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def commit() -> str:
    """Return the checked-out commit; "" without git or outside a checkout, as in a container."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def source_digest() -> str:
    """Return the SHA-256 of the files that define a run; it also shows uncommitted changes."""
    digest = hashlib.sha256()
    for folder, pattern in SOURCES:
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder)
            digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def leave_token(run_dir: Path, token: str) -> None:
    """Write, on the first rank, a file that every node must see if run_dir is shared."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / token).write_text(token)


def directory_problems(plan: Plan, run_dir: Path, token: str) -> list[str]:
    """Return the problems of the directories that this node writes to."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    problems = []
    while not (run_dir / token).exists() and time.monotonic() < deadline:
        os.listdir(run_dir) if run_dir.is_dir() else None  # refreshes a network file system
        time.sleep(0.1)
    if not (run_dir / token).exists():
        problems.append(
            f"run_dir = {run_dir} is not the directory that the first rank writes to: it must be"
            " shared"
        )
    for key, directory in (
        ("run_dir", run_dir),
        ("data.path_to_cache", Path(plan.config.data.path_to_cache)),
    ):
        if problem := unwritable(directory):
            problems.append(f"{key} = {directory} cannot be written: {problem}")
    return problems


def unwritable(directory: Path) -> str | None:
    """Return why no file can be written there, or None; it writes and deletes one."""
    probe = directory / f".preflight_{node_name()}_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("mixtrain\n")
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def data_sizes(plan: Plan) -> dict[str, int]:
    """Return every file of the run's data with its size on this node."""
    data = plan.config.data
    if data.kind is not DataKind.indexed:
        return {}
    paths = [
        f"{prefix}{end}" for prefix in parse_blend(data.data_path)[0] for end in (".bin", ".idx")
    ]
    paths += [str(path) for path in sorted(Path(data.tokenizer).glob("*")) if path.is_file()]
    return {path: os.path.getsize(path) if os.access(path, os.R_OK) else -1 for path in paths}
