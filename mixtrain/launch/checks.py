"""Check before submission what would make a Slurm job fail hours later. No torch.

Rule: nothing is written and no job is submitted; `sbatch --test-only` checks what Slurm itself can.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from mixtrain.config.choices import Mode, Resume
from mixtrain.config.plan import Plan
from mixtrain.config.rules.launcher import seconds_of
from mixtrain.errors import UserError
from mixtrain.launch import cluster, containers
from mixtrain.launch.cluster import Node
from mixtrain.launch.script import ROOT, env_file, gpus_per_node

Problems = Iterator[str]
TASK = "SLURM_ARRAY_TASK_ID"


def submission_problems(plan: Plan, overrides: list[str], folder: Path) -> list[str]:
    """Return why the plan should not be submitted from `folder`, except its data and run_dir."""
    problems = [
        *env_file_problems(plan, folder),
        *container_problems(plan, folder),
        *array_problems(plan, overrides),
        *requeue_problems(plan),
    ]
    if not cluster.has_slurm():
        return [*problems, no_slurm(plan)]
    try:
        return problems + [*partition_problems(plan, cluster.nodes())]
    except UserError as error:
        return [*problems, *error.problems]


def no_slurm(plan: Plan) -> str:
    alternative = "launcher=local runs here"
    if plan.config.trainer.num_nodes > 1:
        alternative = "trainer.num_nodes=1 launcher=local runs on this machine"
    return (
        "launcher = slurm, but there is no sbatch on PATH; type this where Slurm's commands"
        f" are. {alternative}"
    )


def env_file_problems(plan: Plan, folder: Path) -> Problems:
    path = env_file(plan, folder)
    if not path.is_file():
        given = plan.config.launcher.env_file or path
        yield f"launcher.env_file = {given}: no such file; null is slurm/env.sh"


def container_problems(plan: Plan, folder: Path) -> Problems:
    image = plan.config.launcher.container_image
    if not image:
        return
    is_path = image.startswith(("/", ".", "~")) or image.endswith(".sqsh")
    if is_path and not (folder / os.path.expanduser(image)).is_file():
        yield (
            f"launcher.container_image = {image}: no such file; docs/cluster.md says how to"
            " make one"
        )
    try:
        mounts = containers.mounts_of(plan.config, folder, ROOT)
    except UserError as error:
        yield from error.problems
        return
    for mount in mounts:
        if not os.path.exists(mount.host):
            yield f"launcher.container_mounts: {mount.host} does not exist on this machine"
    yield from containers.hidden_path_problems(plan.config, folder, mounts)


def requeue_problems(plan: Plan) -> Problems:
    checkpoint = plan.config.checkpoint
    trains = plan.saves and plan.config.trainer.mode is Mode.train
    if checkpoint.resume is Resume.never and trains:
        yield (
            "checkpoint.resume = never would refuse the job when it returns to its run_dir; use"
            " auto, in a run_dir that holds no run yet"
        )


def array_problems(plan: Plan, overrides: list[str]) -> Problems:
    """Check a job array: with %1 each task resumes the previous one, else each needs a run_dir."""
    array = plan.config.launcher.sbatch_args.get("array")
    if array is None or str(array).endswith("%1"):
        return
    if not any(TASK in override for override in overrides):
        yield (
            f"launcher.sbatch_args.array = {array} starts jobs side by side in one run_dir; type"
            f" run_dir='runs/${{name}}-${{oc.env:{TASK},0}}', or array={array}%1 for one after the"
            " other"
        )


def partition_problems(plan: Plan, nodes: list[Node]) -> Problems:
    """Check that the cluster has the partition, and the partition the nodes, GPUs and time."""
    trainer = plan.config.trainer
    partitions = list(dict.fromkeys(node.partition for node in nodes))
    requested = plan.config.launcher.partition
    if requested is None:
        requested = next((node.partition for node in nodes if node.is_default), None)
        if requested is None:
            yield (
                "launcher.partition = null, but this cluster has no default; use"
                f" {' or '.join(partitions)}"
            )
            return
    names = requested.split(",")  # Slurm uses the first one that can start the job
    unknown = [name for name in names if name not in partitions]
    for name in unknown:
        near = get_close_matches(name, partitions, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        yield (
            f"launcher.partition = {name}: {hint}the partitions of this cluster are"
            f" {', '.join(partitions)}"
        )
    candidates = [node for node in nodes if node.partition in names]
    if unknown or not candidates:
        return
    yield from time_limit_problems(plan, candidates)
    gpus = gpus_per_node(plan)
    most = max(node.gpus for node in candidates)
    where = f"partition {requested}"
    if gpus > most:
        available = f"no node of {where} has any; use"
        if most:
            available = (
                f"a node of {where} has {most} at most; use trainer.devices={most} and more"
                " nodes, or"
            )
        yield (
            f"launcher.gpus_per_node = {gpus} ({_gpus_source(plan)}): {available} another"
            " launcher.partition"
        )
        return
    fitting = {node.name for node in candidates if node.gpus >= gpus}
    if trainer.num_nodes > len(fitting):
        all_fit = fitting == {node.name for node in candidates}
        with_gpus = f" with {gpus} GPUs" if gpus and not all_fit else ""
        yield (
            f"trainer.num_nodes = {trainer.num_nodes}, but {where} has {len(fitting)}"
            f" nodes{with_gpus}; use {len(fitting)}"
        )


def time_limit_problems(plan: Plan, nodes: list[Node]) -> Problems:
    """Check the time limit: many clusters accept a job that is too long and never start it."""
    requested = plan.config.launcher.time
    limits = {node.time_limit: seconds_of(node.time_limit) or math.inf for node in nodes}
    longest = max(limits, key=limits.get)
    if requested is not None and (seconds_of(requested) or 0) > limits[longest]:
        where = "/".join(dict.fromkeys(node.partition for node in nodes))
        yield (
            f"launcher.time = {requested} is more than partition {where} allows; use at most"
            f" {longest}"
        )


def _gpus_source(plan: Plan) -> str:
    return "as typed" if plan.config.launcher.gpus_per_node is not None else "from trainer.devices"
