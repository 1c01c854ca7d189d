"""Certify that the parallel layout does not change the result: compare every layout with one rank.

    python tools/parity.py +recipe=NAME [KEY=VALUE ...]
    python tools/parity.py +recipe=NAME --sample 30

Takes the settings of a recipe (router, dispatcher options, sharding, recompute, implementation),
shrinks its sizes (conf/shrink/parity.yaml) and trains the same weights on the same global batch for
two steps at every legal layout of up to 8 CPU ranks: EP, ETP, TP, PP, VPP, CP, DP, hybrid shard,
both dispatchers. Compares LM loss, load-balancing loss, gradient norm, every parameter's gradient,
and the parameters after the steps with the one-rank run. Prints the largest differences and writes
them to the run directory (parity.json, parity.md).

Exit codes: 0 all within the limits of mixtrain/training/compare_steps.py; 1 one is not (the first
parameter is named); 2 wrong configuration or arguments; 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

# runs from a checkout, without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.config.choices import Accelerator, Precision  # noqa: E402
from mixtrain.config.compose import compose  # noqa: E402
from mixtrain.config.planner import make_plan  # noqa: E402
from mixtrain.config.schema import Config  # noqa: E402
from mixtrain.config.typed_config import from_hydra  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems  # noqa: E402
from mixtrain.launch.machine_checks import machine_problems  # noqa: E402
from mixtrain.system.closed_pipe import run_main  # noqa: E402


def parse_arguments(arguments=None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", metavar="N", type=int, help="N random layouts instead of all")
    parser.add_argument(
        "--sample-seed",
        metavar="SEED",
        type=int,
        default=0,
        help="seed of the random choice (default: 0)",
    )
    args, overrides = parser.parse_known_args(arguments)
    if unknown := [override for override in overrides if override.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.sample is not None and args.sample < 1:
        parser.error(f"--sample {args.sample}: at least 1")
    return args, overrides


# Keys that the certificate sets itself, for each layout.
VARIED_KEYS = {
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


def shrink(overrides: list[str]) -> Config:
    """Return the configuration at the certificate's sizes; overrides of sizes still apply.

    Raises UserError with every problem of the overrides, or of this machine.
    """
    recipes = [override for override in overrides if override.startswith("+recipe=")]
    rest = [override for override in overrides if override not in recipes]
    jobs, problems = compose([*recipes, "+shrink=parity", *rest])
    if len(jobs) != 1:
        raise UserError(*problems, "one configuration at a time: no --multirun here")
    problems += [
        f"{override}: the certificate runs every layout and sets this itself; remove it"
        for override in overrides
        if override.split("=")[0] in VARIED_KEYS
    ]
    config = from_hydra(jobs[0].tree, problems)
    trainer = config.trainer
    if trainer.precision is not Precision.fp32 or trainer.accelerator is not Accelerator.cpu:
        problems.append(
            "the certificate is for trainer.precision=fp32 on trainer.accelerator=cpu; remove other"
            " values"
        )
    if trainer.micro_batch_size != 1:
        problems.append(
            f"trainer.micro_batch_size = {trainer.micro_batch_size} must be 1 for the certificate"
        )
    plan = make_plan(config, None, problems)
    if missing := machine_problems(plan, None, overrides):
        raise UserError(*missing)
    return config


def main() -> int:
    args, overrides = parse_arguments()
    try:
        config = shrink(overrides)
        from mixtrain.proof.parity.certificate import Certificate  # imports torch

        certificate = Certificate(
            config.name, config, Path(config.run_dir), lambda text: print(text, flush=True)
        )
        is_same = certificate.run(args.sample, args.sample_seed)
    except UserError as error:
        print_problems(error.problems)
        return REFUSED
    except KeyboardInterrupt:
        print(
            "\ninterrupted; parity.json and parity.md are updated every ten layouts and have the"
            " layouts up to then",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(f"\n{certificate.folder}/parity.json and parity.md")
    if is_same:
        print("every layout computes what one rank computes")
        return FINISHED
    outside = [layout for layout, verdict in certificate.verdicts.items() if verdict.outside]
    print(f"{len(outside)} layouts differ, first {outside[0]}: {certificate.verdicts[outside[0]]}")
    return FAULT


if __name__ == "__main__":
    sys.exit(run_main(main))
