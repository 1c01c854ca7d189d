"""Choose where a plan runs: `launcher=auto|local|slurm`. No torch.

Rule: a process that torchrun or srun started is a rank; only any other process starts ranks or
submits a job.
"""

from __future__ import annotations

import os
import shutil

from mixtrain.config.choices import LauncherType
from mixtrain.config.plan import Plan
from mixtrain.launch import local, submit
from mixtrain.system import streams
from mixtrain.system.rank_identity import Identity
from mixtrain.training.preflight import with_records_dir
from mixtrain.training.run_directory import console_log

LOCAL = ("launcher=local", "launcher.type=local")


def starts_ranks(identity: Identity | None, overrides: list[str]) -> bool:
    """Return whether this process is no rank, or the only task of a shell with launcher=local.

    `srun --pty bash` also starts one task: without that override, train.py is the only rank there.
    """
    if identity is None:
        return True
    alone = identity.world_size == 1 and "RANK" not in os.environ
    return alone and any(override in LOCAL for override in overrides)


def chosen_launcher(plan: Plan) -> LauncherType:
    """Return local or slurm, for a process that is not a rank."""
    launcher = plan.config.launcher.type
    if launcher is not LauncherType.auto:
        return launcher
    needs_slurm = plan.config.trainer.num_nodes > 1 and shutil.which("sbatch")
    return LauncherType.slurm if needs_slurm else LauncherType.local


def launch(plan: Plan, overrides: list[str]) -> int:
    """Run the plan of these overrides on this machine or submit it; return the exit code."""
    streams.make_tolerant(console_log(with_records_dir(plan)))
    if chosen_launcher(plan) is LauncherType.slurm:
        return submit.submit(plan, overrides)
    return local.start(with_records_dir(plan))
