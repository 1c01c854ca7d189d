"""Quick checks of nodes, network and numerics before the model is built. No torch here.

Rule: every failure names its node, all problems are collected before they are reported, and the
preflight changes nothing that the run computes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mixtrain.config.choices import Accelerator, Mode, Preflight, Resume
from mixtrain.config.plan import Plan

FOLDER = "preflight"  # in run_dir


def is_enabled(plan: Plan) -> bool:
    """Whether the run starts with a preflight."""
    trainer = plan.config.trainer
    if trainer.mode is Mode.preflight or trainer.preflight is not Preflight.auto:
        return trainer.mode is Mode.preflight or trainer.preflight is Preflight.always
    return trainer.num_nodes > 1 or trainer.accelerator is Accelerator.gpu


def with_records_dir(plan: Plan) -> Plan:
    """Return the plan with the run_dir for its records: a subfolder if the mode is preflight.

    So a preflight alone does not touch the records of a run.
    """
    if plan.config.trainer.mode is not Mode.preflight:
        return plan
    config = plan.config
    # the subfolder holds older preflights, which must not be refused
    checkpoint = replace(config.checkpoint, resume=Resume.auto)
    return replace(
        plan,
        config=replace(config, run_dir=str(Path(config.run_dir) / FOLDER), checkpoint=checkpoint),
    )


def run_dir_of(plan: Plan) -> Path:
    """Return the directory of the run itself, from a plan that with_records_dir returned."""
    run_dir = Path(plan.config.run_dir)
    return run_dir.parent if plan.config.trainer.mode is Mode.preflight else run_dir
