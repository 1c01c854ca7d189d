"""Send a run to Slurm: what `python train.py` does for several nodes on a cluster, for one node
too.

    python tools/submit.py +recipe=mixtral_8x7b_ep8 trainer.num_nodes=2 launcher.partition=gpu
      launcher.time=1-00:00:00
    python tools/submit.py +recipe=mixtral_8x7b_ep8 trainer.num_nodes=2 trainer.mode=preflight
    python tools/submit.py +recipe=NAME ... --print > job.sbatch

Checks the configuration and the cluster, submits, and prints the job's number, its logs and how to
follow it. --print writes the job's script to stdout, byte for byte as a submission sends it, and
submits nothing. More: docs/cluster.md.

Exit codes: 0 sent (or printed), 2 the configuration, the input, or what Slurm refuses.
"""

import argparse
import sys
from pathlib import Path

# run from a checkout, nothing installed
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
    arguments, words = parser.parse_known_args(arguments)
    if unknown := [word for word in words if word.startswith("-")]:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; a flag of sbatch is"
            " launcher.sbatch_args.NAME=VALUE"
        )
    return arguments, words


def plans_of(words: list[str], multirun: bool, check: bool) -> list[tuple[Plan, list[str]]]:
    """The plans of the words, each with its own; UserError with all that is wrong with one of them."""
    jobs, problems = compose([*words, *(["--multirun"] if multirun else [])])
    found = [(plan_of(job, problems), job.overrides) for job in jobs]
    wrong = [problem for plan, _ in found for problem in impossible(plan)]
    if check and not wrong:
        wrong = [problem for plan, overrides in found for problem in job_problems(plan, overrides)]
        wrong += shared_directories([plan for plan, _ in found])
    if wrong:
        raise UserError(*dict.fromkeys(wrong))
    return found


def impossible(plan: Plan) -> list[str]:
    found = []
    if plan.config.launcher.type is LauncherType.local:
        found.append("launcher = local does not submit; take it out, or type python train.py")
    if plan.config.trainer.mode is Mode.plan:
        found.append(
            "trainer.mode = plan needs no job; type python train.py, or --print to see the script"
        )
    return found


def main() -> int:
    arguments, words = parse_arguments()
    try:
        for plan, overrides in plans_of(words, arguments.multirun, check=not arguments.print):
            (submit.show if arguments.print else submit.submit)(plan, overrides)
    except UserError as error:
        print_problems(error.problems)
        return REFUSED
    return FINISHED


if __name__ == "__main__":
    sys.exit(run_main(main))
