"""Train a Mixtral-class model with Megatron-Core.

    python train.py                                             train the default model on the CPU
    python train.py +recipe=mixtral_8x7b_ep8 trainer.mode=plan  print a recipe's plan, anywhere
    python train.py --help                                      list every group, option and key

Exit codes: 0 finished or stopped on request, 1 an internal error, 2 an error in the configuration
or the input. This file imports torch only in a rank: a wrong configuration is refused within a
second, and the helper processes of a checkpoint save import this file again.
"""

import os
import sys
from contextlib import nullcontext

from mixtrain.system import streams
from mixtrain.system.rank_identity import LAUNCHER, Identity, die_with, is_started, read_identity
from mixtrain.training.signals import exit_on_request, note_requests

if __name__ == "__main__":  # before the other imports, which take half a second
    streams.reserve()
    if not is_started():
        exit_on_request()
    # ranks of our own launcher keep the default: a signal before the first step ends them at once
    elif LAUNCHER not in os.environ:
        note_requests()

from mixtrain.config.choices import LauncherType, Mode
from mixtrain.config.compose import ComposedJob, compose
from mixtrain.config.jobs import plan_of
from mixtrain.config.plan import Plan
from mixtrain.config.plan_page import render
from mixtrain.errors import FINISHED, REFUSED, UserError, print_problems
from mixtrain.launch.choose import chosen_launcher, launch, starts_ranks
from mixtrain.launch.local import load_plan
from mixtrain.launch.machine_checks import machine_problems
from mixtrain.system.closed_pipe import run_main
from mixtrain.training.preflight import with_records_dir
from mixtrain.training.run_directory import (
    claim,
    console_log,
    finished_already,
    previous_status,
    shared_directories,
)

SWEEP = (
    "torchrun and srun start ranks for one run; type python train.py --multirun, which starts them"
    " for each job of a sweep, or start each job by itself"
)


def main(argv: list[str]) -> int:
    """Compose and check all jobs (a sweep has several), run them, return the first nonzero code."""
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
        # one rank of every node prints: a file may be missing on a single node
        if identity is None or identity.local_rank == 0:
            print_problems(error.problems, identity.node if identity else "")
        return REFUSED


def checked_plans(
    jobs: list[ComposedJob], problems: list[str], identity: Identity | None
) -> list[tuple[Plan, list[str]]]:
    """Print the plan of every job; return (plan, overrides) of the jobs to run.

    Raises UserError if this machine, or the cluster that receives a job, cannot run one.
    """
    plans = []
    problems_of_machine = []
    for job in jobs:
        plan = plan_of(job, problems, identity)
        if plan.config.trainer.mode is not Mode.plan:
            streams.make_tolerant()  # a run continues when nobody reads what it prints
        if identity is None or identity.rank == 0:
            print(render(plan), end="\n\n", flush=True)
        if plan.config.trainer.mode is not Mode.plan:
            problems_of_machine += machine_problems(plan, identity, job.argv)
            plans.append((plan, job.argv))
    # ranks have one rendezvous and create their process groups once
    if identity is not None and len(plans) > 1:
        problems_of_machine.insert(0, f"these are {len(plans)} jobs, but {SWEEP}")
    refusals = [
        *dict.fromkeys(problems_of_machine),
        *shared_directories([plan for plan, _ in plans]),
    ]
    if refusals:
        raise UserError(*refusals)
    return plans


def run_jobs(plans: list[tuple[Plan, list[str]]], identity: Identity | None) -> int:
    """Run the jobs one after the other until a stop is requested; the first nonzero exit code."""
    prints = identity is None or identity.rank == 0
    first_failure = FINISHED
    for number, (plan, overrides) in enumerate(plans, start=1):
        if len(plans) > 1 and prints:
            print(f"job {number} of {len(plans)}, in {plan.config.run_dir}", flush=True)
        line = finished_already(plan) if plan.config.trainer.mode is Mode.train else None
        if line:
            if prints:
                print(line, flush=True)
            continue
        code = (
            launch(plan, overrides) if identity is None else train(with_records_dir(plan), identity)
        )
        first_failure = first_failure or code
        if identity is None and was_stopped(plan):
            break
    return first_failure


def was_stopped(plan: Plan) -> bool:
    """Return whether a local run was stopped on request; cluster jobs have not started yet."""
    return (
        chosen_launcher(plan) is LauncherType.local
        and previous_status(with_records_dir(plan).config.run_dir).get("state") == "stopped"
    )


def train(plan: Plan, identity: Identity) -> int:
    """Train as this rank of the job; return its exit code."""
    # before torch is imported: its loggers hold on to standard error
    streams.make_tolerant(console_log(plan, identity.rank))
    # our own launcher claims the run directory before it starts this rank
    with claim(plan) if identity.rank == 0 and not identity.is_ours else nullcontext():
        from mixtrain.training.worker import run  # the first import of torch

        return run(plan, identity)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
