"""What Slurm says of its cluster: partitions, their nodes, GPUs and cores. No torch.

Rule: only Slurm's own commands are asked, each with a time limit, and nothing is changed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import NamedTuple

from mixtrain.errors import UserError

PATIENCE_S = 30  # a controller that is busy answers in seconds


class Node(NamedTuple):
    name: str
    partition: str
    is_default: bool  # of the partition
    cores: int
    gpus: int


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def ask(*command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. UserError if it does not end in time."""
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"launcher = slurm, but {command[0]} has not answered for {PATIENCE_S} s") from None


def last_line(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed has to say, in a line."""
    lines = [line for line in answer.stderr.splitlines() if line.strip()] or [f"exit code {answer.returncode}"]
    return re.sub(r"^(\w+: )(error: |fatal: )?", "", lines[-1]).strip()


def nodes() -> list[Node]:
    """Every node of every partition, one line each. UserError if Slurm does not answer."""
    answer = ask("sinfo", "--noheader", "--Node", "--format=%N|%P|%c|%G")
    if answer.returncode:
        raise UserError(f"launcher = slurm, but sinfo does not answer here: {last_line(answer)}")
    found = []
    for line in answer.stdout.splitlines():
        name, partition, cores, gres = line.split("|", 3)
        is_default = partition.endswith("*")
        found.append(Node(name.strip(), partition.rstrip("*").strip(), is_default, int(cores), gpus_of(gres)))
    return found


def gpus_of(gres: str) -> int:
    """GPUs in Slurm's words: `gpu:h100:8(S:0-1),nic:2` are 8, `(null)` none."""
    without_sockets = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(count) for count in re.findall(r"(?:^|,)\s*gpu(?::[^,:]+)?:(\d+)", without_sockets))
