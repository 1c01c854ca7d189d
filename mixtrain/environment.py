"""Who this process is: a rank that torchrun, Slurm or mixtrain started, or the one that is to start them. No torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

OWN_RENDEZVOUS = "MIXTRAIN_RENDEZVOUS"  # set for the ranks that mixtrain starts itself: a file they meet at


@dataclass(frozen=True)
class Identity:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str  # torch.distributed's init_method

    @property
    def is_ours(self) -> bool:
        """Started by this project's own launcher, which has printed the plan and reports failures."""
        return self.rendezvous.startswith("file://")


def identity() -> Identity | None:
    """This process's rank from torchrun's or Slurm's environment; None where nobody has started ranks."""
    env = os.environ
    if "RANK" in env:
        world = int(env.get("WORLD_SIZE", 1))
        local_world = int(env.get("LOCAL_WORLD_SIZE", world))
        rendezvous = env.get(OWN_RENDEZVOUS, "env://")
        return Identity(int(env["RANK"]), world, int(env.get("LOCAL_RANK", env["RANK"])), local_world, rendezvous)
    if "SLURM_PROCID" in env:
        world = int(env.get("SLURM_NTASKS", 1))
        local_world = int(env.get("SLURM_NTASKS_PER_NODE", world // int(env.get("SLURM_NNODES", 1))))
        local_rank = int(env.get("SLURM_LOCALID", 0))
        return Identity(int(env["SLURM_PROCID"]), world, local_rank, local_world, _slurm_rendezvous())
    return None


def _slurm_rendezvous() -> str:
    """The first node of the job, at a port that follows from the job's number: the same on every rank."""
    host = os.environ.get("MASTER_ADDR")
    if not host:
        # node[07-09,12],login[1-2] is node07, node08 ...; scontrol would tell, but a container seldom has it
        host = re.sub(r"\[(\w+)[^]]*\]", r"\1", os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")).split(",")[0]
    port = os.environ.get("MASTER_PORT") or 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000
    return f"tcp://{host}:{port}"
