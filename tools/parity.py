"""Prove that a layout does not change the mathematics: every layout against one rank.

    python tools/parity.py +recipe=NAME [KEY=VALUE ...]
    python tools/parity.py +recipe=NAME --sample 30

Takes the switches of a recipe (router, dispatcher options, sharding, recompute, implementation),
shrinks its sizes (conf/shrink/parity.yaml) and trains the same weights on the same global batch for
two steps at every legal layout of up to 8 CPU ranks: EP, ETP, TP, PP, VPP, CP, DP, hybrid shard,
both dispatchers. Prints, and writes to the run directory (parity.json, parity.md), the largest
difference from the one-rank run of LM loss, load-balancing loss, gradient norm, every parameter's
gradient, and the parameters after the steps.

Exit codes: 0 all within the limits of mixtrain/training/compare_steps.py, 1 one is not (the first
parameter is named), 2 the configuration or the arguments are wrong, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.config.choices import Accelerator, Precision  # noqa: E402
from mixtrain.config.compose import compose  # noqa: E402
from mixtrain.config.planner import make_plan  # noqa: E402
from mixtrain.config.schema import Config  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems  # noqa: E402
from mixtrain.launch.machine_checks import machine_problems  # noqa: E402
from mixtrain.system.closed_pipe import run_main  # noqa: E402


def parse_arguments(arguments=None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", metavar="N", type=int, help="N random layouts instead of all")
    parser.add_argument(
        "--sample-seed", metavar="SEED", type=int, default=0, help="which ones (default: 0)"
    )
    arguments, words = parser.parse_known_args(arguments)
    if unknown := [word for word in words if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.sample is not None and arguments.sample < 1:
        parser.error(f"--sample {arguments.sample}: at least 1")
    return arguments, words


# What the tool itself sets, in turn.
VARIED = {
    "parallel",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.sequence_parallel",
    "parallel.num_distributed_optimizer_instances",
    "dispatcher.moe_token_dispatcher_type",
    "trainer.devices",
    "trainer.num_nodes",
}
INTERRUPTED = 130


def shrunk(words: list[str]) -> Config:
    """The configuration of the words at the certificate's sizes; what the words set themselves
    stays.

    UserError with every problem of the words, or if this machine lacks something.
    """
    recipes = [word for word in words if word.startswith("+recipe=")]
    others = [word for word in words if word not in recipes]
    jobs, problems = compose([*recipes, "+shrink=parity", *others])
    if len(jobs) != 1:
        raise UserError(*problems, "one configuration at a time: no --multirun here")
    varied = [word for word in words if word.split("=")[0] in VARIED]
    problems += [
        f"{word}: the certificate runs every layout and sets this itself; take it out"
        for word in varied
    ]
    config = Config.from_hydra(jobs[0].tree, problems)
    if (
        config.trainer.precision is not Precision.fp32
        or config.trainer.accelerator is not Accelerator.cpu
    ):
        problems.append(
            "the certificate is for trainer.precision=fp32 on trainer.accelerator=cpu; take out"
            " others"
        )
    if config.trainer.micro_batch_size != 1:
        problems.append(
            f"trainer.micro_batch_size = {config.trainer.micro_batch_size} must be 1 for the"
            " certificate"
        )
    if lacking := machine_problems(make_plan(config, None, problems), None, words):
        raise UserError(*lacking)
    return config


def main() -> int:
    arguments, words = parse_arguments()
    try:
        config = shrunk(words)
        from mixtrain.proof.parity.certificate import Certificate  # the first import of torch

        certificate = Certificate(
            config.name, config, Path(config.run_dir), lambda text: print(text, flush=True)
        )
        same = certificate.run(arguments.sample, arguments.sample_seed)
    except UserError as error:
        print_problems(error.problems)
        return REFUSED
    except KeyboardInterrupt:
        print(
            "\ninterrupted; parity.json and parity.md have the layouts up to the last tenth",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(f"\n{certificate.folder}/parity.json and parity.md")
    if same:
        print("every layout computes what one rank computes")
        return FINISHED
    outside = [layout for layout, verdict in certificate.verdicts.items() if verdict.outside]
    print(f"{len(outside)} layouts differ, first {outside[0]}: {certificate.verdicts[outside[0]]}")
    return FAULT


if __name__ == "__main__":
    sys.exit(run_main(main))
