"""Train a Mixtral-class model with Megatron-Core.

    python train.py                                             the default, on this machine's CPU
    python train.py +recipe=mixtral_8x7b_ep8 trainer.mode=plan  what a recipe would do, on any machine
    python train.py --help                                      every group, option and key

Exit codes: 0 finished or stopped on request, 2 the configuration or the input, 1 a fault.
Nothing here imports torch: a wrong configuration is refused in a second, and helper processes that a checkpoint
starts import this file again.
"""

import sys

from mixtrain import launch
from mixtrain.compose import Composed, compose
from mixtrain.config import Config, Mode
from mixtrain.environment import identity
from mixtrain.errors import FINISHED, REFUSED, UserError, print_problems
from mixtrain.machine import machine_problems
from mixtrain.plan import make_plan
from mixtrain.report import render


def main(argv: list[str]) -> int:
    """Compose, then run each job (a sweep has several); the first exit code that is not 0."""
    me = identity()
    try:
        jobs, problems = compose(argv)
        codes = [run_job(job, problems) for job in jobs]
    except UserError as error:
        if me is None or me.local_rank == 0:  # of every node: what is missing may be missing on one of them
            print_problems(error.problems)
        return REFUSED
    return next((code for code in codes if code), FINISHED)


def run_job(job: Composed, problems: list[str]) -> int:
    """One configuration: to its plan, and on to its ranks, or into training where this process is a rank."""
    me = identity()
    recipe = job.recipe and (job.recipe.name, Config.from_hydra(job.recipe.tree))
    plan = make_plan(Config.from_hydra(job.tree, problems), me and me.world_size, problems, recipe)
    if me is None or (me.rank == 0 and not me.is_ours):
        print(render(plan), end="\n\n", flush=True)
    if plan.config.trainer.mode is Mode.plan:
        return FINISHED
    if problems := machine_problems(plan, me, job.overrides):
        raise UserError(*problems)
    if me is None:
        return launch.start(plan, job.overrides)
    from mixtrain.run import run  # the first import of torch

    return run(plan, me)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
