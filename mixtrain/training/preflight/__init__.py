"""What a run finds out about its nodes in seconds, before a model is built and hours are spent. No torch here.

Rule: every failure names the node, all that can be found out is found out before it is said, and nothing that the run
will compute changes for it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mixtrain.config.choices import Accelerator, Mode, Preflight, Resume
from mixtrain.config.plan import Plan

FOLDER = "preflight"  # in run_dir


def wanted(plan: Plan) -> bool:
    """Whether the run begins with a preflight."""
    trainer = plan.config.trainer
    if trainer.mode is Mode.preflight or trainer.preflight is not Preflight.auto:
        return trainer.mode is Mode.preflight or trainer.preflight is Preflight.always
    return trainer.num_nodes > 1 or trainer.accelerator is Accelerator.gpu


def recorded(plan: Plan) -> Plan:
    """The plan with the directory that its records go to: a preflight alone leaves those of a run as they are."""
    if plan.config.trainer.mode is not Mode.preflight:
        return plan
    config = plan.config
    # what is there are older preflights
    checkpoint = replace(config.checkpoint, resume=Resume.auto)
    return replace(
        plan,
        config=replace(config, run_dir=str(Path(config.run_dir) / FOLDER), checkpoint=checkpoint),
    )


def run_dir_of(plan: Plan) -> Path:
    """The directory of the run, of a `recorded` plan."""
    run_dir = Path(plan.config.run_dir)
    return run_dir.parent if plan.config.trainer.mode is Mode.preflight else run_dir
