"""Train a Mixtral-class model with Megatron-Core.

    python train.py                                             the default, on this machine's CPU
    python train.py +recipe=mixtral_8x7b_ep8 trainer.mode=plan  what a recipe would do, on any machine
    python train.py --help                                      every group, option and key

Exit codes: 0 finished or stopped on request, 2 the configuration or the input, 1 a fault.
Nothing here imports torch: a wrong configuration is refused in a second, and helper processes that a checkpoint
starts import this file again.
"""

import os
import sys
from contextlib import nullcontext

from mixtrain.environment import LAUNCHER, Identity, die_with, identity, is_started
from mixtrain.stop import exit_on_request

if __name__ == "__main__" and not is_started():
    exit_on_request()  # before the other imports, which take half a second

from mixtrain import launch
from mixtrain.compose import Composed, compose
from mixtrain.config import Config, Mode
from mixtrain.errors import FINISHED, REFUSED, UserError, print_problems
from mixtrain.machine import machine_problems
from mixtrain.plan import Plan, make_plan
from mixtrain.report import render
from mixtrain.run_directory import claimed, finished_already, shared_directories
from mixtrain.status import read_status


def main(argv: list[str]) -> int:
    """Compose, check all jobs (a sweep has several), then run them; the first exit code that is not 0."""
    me = None
    try:
        me = identity()
        if me and me.is_ours:
            die_with(int(os.environ[LAUNCHER]))
            return train(launch.handed_plan(), me)
        jobs, problems = compose(argv)
        return run_jobs(checked_plans(jobs, problems, me), me)
    except UserError as error:
        if me is None or me.local_rank == 0:  # of every node: what is missing may be missing on one of them
            print_problems(error.problems)
        return REFUSED


def checked_plans(jobs: list[Composed], problems: list[str], me: Identity | None) -> list[Plan]:
    """The plans of the jobs that are to be trained, all printed; a UserError if this machine cannot run one."""
    plans, lacking = [], []
    for job in jobs:
        plan = plan_of(job, problems, me)
        if me is None or me.rank == 0:
            print(render(plan), end="\n\n", flush=True)
        if plan.config.trainer.mode is not Mode.plan:
            lacking += machine_problems(plan, me, job.overrides)
            plans.append(plan)
    if lacking := [*dict.fromkeys(lacking), *shared_directories(plans)]:
        raise UserError(*lacking)
    return plans


def plan_of(job: Composed, problems: list[str], me: Identity | None) -> Plan:
    """A plan that is only printed is that of any machine: how many ranks somebody has started here is not asked."""
    config = Config.from_hydra(job.tree, problems)
    recipe = job.recipe and (job.recipe.name, Config.from_hydra(job.recipe.tree))
    started = me.world_size if me and config.trainer.mode is not Mode.plan else None
    return make_plan(config, started, problems, recipe)


def run_jobs(plans: list[Plan], me: Identity | None) -> int:
    """One after the other, until somebody asks to stop."""
    codes = []
    for number, plan in enumerate(plans, start=1):
        if len(plans) > 1 and (me is None or me.rank == 0):
            print(f"job {number} of {len(plans)}, in {plan.config.run_dir}", flush=True)
        if line := finished_already(plan):
            print(line if me is None or me.rank == 0 else "", end="\n" * (me is None or me.rank == 0), flush=True)
            continue
        codes.append(launch.start(plan) if me is None else train(plan, me))
        if me is None and read_status(plan.config.run_dir)["state"] == "stopped":
            break
    return next((code for code in codes if code), FINISHED)


def train(plan: Plan, me: Identity) -> int:
    """This process is a rank."""
    # our own launcher has claimed it before it started this rank
    with claimed(plan) if me.rank == 0 and not me.is_ours else nullcontext():
        from mixtrain.run import run  # the first import of torch

        return run(plan, me)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
