"""Query Slurm for its partitions, nodes, GPUs and cores. No torch.

Rule: only Slurm's own commands are run, each with a time limit, and nothing is changed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import NamedTuple

from mixtrain.errors import UserError

TIMEOUT_S = 30  # a busy controller answers within seconds


class Node(NamedTuple):
    """A node in one of its partitions."""

    name: str
    partition: str
    is_default: bool  # whether the partition is the default
    cores: int
    gpus: int
    time_limit: str  # of the partition, in Slurm's format


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def run_command(
    *command: str, stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. UserError if it does not end in time."""
    try:
        return subprocess.run(
            command,
            input=stdin,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"launcher = slurm, but {command[0]} has not answered for {TIMEOUT_S} s"
        ) from None


def failure_reason(result: subprocess.CompletedProcess[str]) -> str:
    """Return the error output of a failed command as one line."""
    lines = [
        line.strip()
        for line in result.stderr.splitlines()
        if line.strip() and not line.startswith("Try ")
    ]
    messages = [re.sub(r"^(\w+: )?(error: |fatal: )?", "", line) for line in lines]
    return "; ".join(dict.fromkeys(messages)) or f"exit code {result.returncode}"


def nodes() -> list[Node]:
    """Return every node of every partition. UserError if Slurm does not answer."""
    result = run_command("sinfo", "--noheader", "--Node", "--format=%N|%P|%c|%l|%G")
    if result.returncode:
        reason = failure_reason(result)
        raise UserError(f"launcher = slurm, but sinfo does not answer here: {reason}")
    rows = []
    for line in result.stdout.splitlines():
        name, partition, cores, limit, gres = (column.strip() for column in line.split("|", 4))
        is_default = partition.endswith("*")
        partition = partition.rstrip("*")
        rows.append(Node(name, partition, is_default, int(cores), gpus_of(gres), limit))
    return rows


def gpus_of(gres: str) -> int:
    """Return the GPUs of Slurm's GRES: `gpu:h100:8(S:0-1),nic:2` is 8, `(null)` is 0."""
    without_sockets = re.sub(r"\([^)]*\)", "", gres)
    return sum(
        int(count) for count in re.findall(r"(?:^|,)\s*gpu(?::[^,:]+)?:(\d+)", without_sockets)
    )
