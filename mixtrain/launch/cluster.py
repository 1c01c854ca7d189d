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
    limit: str  # the partition's time limit, in Slurm's words


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def ask(
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
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"launcher = slurm, but {command[0]} has not answered for {PATIENCE_S} s"
        ) from None


def reason(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed has to say, in a line."""
    lines = [
        line.strip()
        for line in answer.stderr.splitlines()
        if line.strip() and not line.startswith("Try ")
    ]
    said = [re.sub(r"^(\w+: )?(error: |fatal: )?", "", line) for line in lines]
    return "; ".join(dict.fromkeys(said)) or f"exit code {answer.returncode}"


def nodes() -> list[Node]:
    """Every node of every partition, one line each. UserError if Slurm does not answer."""
    answer = ask("sinfo", "--noheader", "--Node", "--format=%N|%P|%c|%l|%G")
    if answer.returncode:
        raise UserError(f"launcher = slurm, but sinfo does not answer here: {reason(answer)}")
    found = []
    for line in answer.stdout.splitlines():
        name, partition, cores, limit, gres = (part.strip() for part in line.split("|", 4))
        is_default = partition.endswith("*")
        found.append(
            Node(name, partition.rstrip("*"), is_default, int(cores), gpus_of(gres), limit)
        )
    return found


def gpus_of(gres: str) -> int:
    """GPUs in Slurm's words: `gpu:h100:8(S:0-1),nic:2` are 8, `(null)` none."""
    without_sockets = re.sub(r"\([^)]*\)", "", gres)
    return sum(
        int(count) for count in re.findall(r"(?:^|,)\s*gpu(?::[^,:]+)?:(\d+)", without_sockets)
    )
