"""Train a Mixtral-class model with Megatron-Core.

    python train.py                                             the default, on this machine's CPU
    python train.py +recipe=mixtral_8x7b_ep8 trainer.mode=plan  what a recipe would do, on any
      machine
    python train.py --help                                      every group, option and key

Exit codes: 0 finished or stopped on request, 2 the configuration or the input, 1 a fault. Nothing
here imports torch: a wrong configuration is refused in a second, and helper processes that a
checkpoint starts import this file again.
"""

import os
import sys
from contextlib import nullcontext

from mixtrain.system import streams
from mixtrain.system.rank_identity import LAUNCHER, Identity, die_with, is_started, read_identity
from mixtrain.training.signals import exit_on_request, note_requests

if __name__ == "__main__":  # before the other imports, which take half a second
    streams.hold()
    if not is_started():
        exit_on_request()
    # a rank of our own launcher is ended at once before the first step
    elif LAUNCHER not in os.environ:
        note_requests()

from mixtrain.config.choices import LauncherType, Mode
from mixtrain.config.compose import Composed, compose
from mixtrain.config.jobs import plan_of
from mixtrain.config.plan import Plan
from mixtrain.config.plan_page import render
from mixtrain.errors import FINISHED, REFUSED, UserError, print_problems
from mixtrain.launch.choose import chosen_launcher, launch, starts_ranks
from mixtrain.launch.local import load_plan
from mixtrain.launch.machine_checks import machine_problems
from mixtrain.system.closed_pipe import ended
from mixtrain.training.preflight import recorded
from mixtrain.training.run_directory import (
    claimed,
    console_log,
    finished_already,
    former,
    shared_directories,
)

SWEEP = (
    "torchrun and srun start ranks for one run; type python train.py --multirun, which starts them"
    " for each job of a sweep, or start each job by itself"
)


def main(argv: list[str]) -> int:
    """Compose, check all jobs (a sweep has several), then run them; the first exit code that is not 0."""
    identity = None
    try:
        identity = read_identity()
        if identity and identity.is_ours:
            die_with(int(os.environ[LAUNCHER]))
            return train(load_plan(), identity)
        if starts_ranks(identity, argv):
            identity = None
        jobs, problems = compose(argv)
        return run_jobs(checked_plans(jobs, problems, identity), identity)
    except UserError as error:
        # of every node: what is missing may be missing on one of them
        if identity is None or identity.local_rank == 0:
            print_problems(error.problems, identity.node if identity else "")
        return REFUSED


def checked_plans(
    jobs: list[Composed], problems: list[str], identity: Identity | None
) -> list[tuple[Plan, list[str]]]:
    """The plans of the jobs that are to be run, each with its overrides, all printed.

    A UserError if this machine, or the cluster that a job would be sent to, cannot run one.
    """
    plans = []
    lacking = []
    for job in jobs:
        plan = plan_of(job, problems, identity)
        if plan.config.trainer.mode is not Mode.plan:
            streams.forgive()  # what it prints is not what it is for
        if identity is None or identity.rank == 0:
            print(render(plan), end="\n\n", flush=True)
        if plan.config.trainer.mode is not Mode.plan:
            lacking += machine_problems(plan, identity, job.overrides)
            plans.append((plan, job.overrides))
    # ranks have one place to meet, and one life of process groups
    if identity is not None and len(plans) > 1:
        lacking = [f"these are {len(plans)} jobs, but {SWEEP}", *lacking]
    if lacking := [*dict.fromkeys(lacking), *shared_directories([plan for plan, _ in plans])]:
        raise UserError(*lacking)
    return plans


def run_jobs(plans: list[tuple[Plan, list[str]]], identity: Identity | None) -> int:
    """One after the other, until somebody asks to stop."""
    codes = []
    for number, (plan, overrides) in enumerate(plans, start=1):
        if len(plans) > 1 and (identity is None or identity.rank == 0):
            print(f"job {number} of {len(plans)}, in {plan.config.run_dir}", flush=True)
        line = finished_already(plan) if plan.config.trainer.mode is Mode.train else None
        if line:
            print(
                line if identity is None or identity.rank == 0 else "",
                end="\n" * (identity is None or identity.rank == 0),
                flush=True,
            )
            continue
        codes.append(
            launch(plan, overrides) if identity is None else train(recorded(plan), identity)
        )
        if identity is None and was_stopped(plan):
            break
    return next((code for code in codes if code), FINISHED)


def was_stopped(plan: Plan) -> bool:
    """A run of this machine's was: those of the cluster have not begun."""
    return (
        chosen_launcher(plan) is LauncherType.local
        and former(recorded(plan).config.run_dir).get("state") == "stopped"
    )


def train(plan: Plan, identity: Identity) -> int:
    """This process is a rank."""
    # before torch is imported, whose loggers keep standard error
    streams.forgive(console_log(plan, identity.rank))
    # our own launcher has claimed it before it started this rank
    with claimed(plan) if identity.rank == 0 and not identity.is_ours else nullcontext():
        from mixtrain.training.worker import run  # the first import of torch

        return run(plan, identity)


if __name__ == "__main__":
    sys.exit(ended(main, sys.argv[1:]))
