"""Where a plan is run: `launcher=auto|local|slurm`. No torch.

Rule: whoever torchrun or srun has started is a rank; only a process that nobody has started starts
or submits anything.
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


def starts_ranks(identity: Identity | None, words: list[str]) -> bool:
    """Nobody has started this process as a rank, or only as the one task of a shell, with `launcher=local` typed there.

    `srun --pty bash` is a task too: without the word, train.py is taken for the only rank there is.
    """
    if identity is None:
        return True
    alone = identity.world_size == 1 and "RANK" not in os.environ
    return alone and any(word in LOCAL for word in words)


def place(plan: Plan) -> LauncherType:
    """local or slurm, for a process that is not a rank."""
    asked = plan.config.launcher.type
    if asked is not LauncherType.auto:
        return asked
    several = plan.config.trainer.num_nodes > 1 and shutil.which("sbatch")
    return LauncherType.slurm if several else LauncherType.local


def launch(plan: Plan, words: list[str]) -> int:
    """Run the plan, which the overrides `words` make, wherever it belongs; the exit code."""
    streams.make_tolerant(console_log(with_records_dir(plan)))
    if place(plan) is LauncherType.slurm:
        return submit.submit(plan, words)
    return local.start(with_records_dir(plan))
