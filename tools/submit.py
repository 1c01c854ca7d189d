"""Submit a run to Slurm: as `python train.py` does for several nodes, but for one node too.

    python tools/submit.py +recipe=mixtral_8x7b_ep8 trainer.num_nodes=2 \\
        launcher.partition=gpu launcher.time=1-00:00:00
    python tools/submit.py +recipe=mixtral_8x7b_ep8 trainer.num_nodes=2 trainer.mode=preflight
    python tools/submit.py +recipe=NAME ... --print > job.sbatch

Checks the configuration and the cluster, submits, and prints the job's number, its logs and the
command to follow it. --print writes the job's script to stdout, byte for byte as a submission sends
it, and submits nothing. More: docs/cluster.md.

Exit codes: 0 submitted (or printed), 2 the configuration or input is wrong, or Slurm refuses.
"""

import argparse
import sys
from pathlib import Path

# works in a checkout without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.config.choices import LauncherType, Mode  # noqa: E402
from mixtrain.config.compose import compose  # noqa: E402
from mixtrain.config.jobs import plan_of  # noqa: E402
from mixtrain.config.plan import Plan  # noqa: E402
from mixtrain.errors import FINISHED, REFUSED, UserError, print_problems  # noqa: E402
from mixtrain.launch import submit  # noqa: E402
from mixtrain.launch.machine_checks import job_problems  # noqa: E402
from mixtrain.system.closed_pipe import run_main  # noqa: E402
from mixtrain.training.run_directory import shared_directories  # noqa: E402


def parse_arguments(arguments=None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--print", action="store_true", help="write the script to stdout, submit nothing"
    )
    parser.add_argument("--multirun", action="store_true", help="a job for each value of a=1,2")
    parser.add_argument("--config-dir", metavar="DIR", help="your own conf/ and recipes/")
    options, overrides = parser.parse_known_args(arguments)
    if unknown := [override for override in overrides if override.startswith("-")]:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; a flag of sbatch is"
            " launcher.sbatch_args.NAME=VALUE"
        )
    flags = [f"--config-dir={options.config_dir}"] if options.config_dir else []
    return options, flags + overrides


def plans_of(overrides: list[str], multirun: bool, check: bool) -> list[tuple[Plan, list[str]]]:
    """Return (plan, its overrides) of each job. UserError with all problems of all jobs."""
    jobs, compose_problems = compose([*overrides, *(["--multirun"] if multirun else [])])
    plans = [(plan_of(job, compose_problems), job.argv) for job in jobs]
    problems = [problem for plan, _ in plans for problem in mode_problems(plan)]
    if check and not problems:
        problems = [problem for plan, given in plans for problem in job_problems(plan, given)]
        problems += shared_directories([plan for plan, _ in plans])
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return plans


def mode_problems(plan: Plan) -> list[str]:
    """Return problems with settings that need no job."""
    problems = []
    if plan.config.launcher.type is LauncherType.local:
        problems.append("launcher = local does not submit; take it out, or type python train.py")
    if plan.config.trainer.mode is Mode.plan:
        problems.append(
            "trainer.mode = plan needs no job; type python train.py, or --print to see the script"
        )
    return problems


def main() -> int:
    options, overrides = parse_arguments()
    handle = submit.show if options.print else submit.submit
    try:
        for plan, given in plans_of(overrides, options.multirun, check=not options.print):
            handle(plan, given)
    except UserError as error:
        print_problems(error.problems)
        return REFUSED
    return FINISHED


if __name__ == "__main__":
    sys.exit(run_main(main))
