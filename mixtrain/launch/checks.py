"""What a submission would fail of, hours later: said now, with the key. No torch.

Rule: nothing is written and no job is sent; what Slurm itself can refuse is left to `sbatch
--test-only`.
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


def submission_problems(plan: Plan, words: list[str], folder: Path) -> list[str]:
    """Every reason why the plan of `words` should not be submitted from `folder`, its data and directory apart."""
    found = [*files(plan, folder), *container(plan, folder), *array(plan, words), *may_return(plan)]
    if not cluster.has_slurm():
        return [*found, no_slurm(plan)]
    try:
        return found + [*fits(plan, cluster.nodes())]
    except UserError as error:
        return [*found, *error.problems]


def no_slurm(plan: Plan) -> str:
    several = plan.config.trainer.num_nodes > 1
    instead = (
        "trainer.num_nodes=1 launcher=local runs on this machine"
        if several
        else "launcher=local runs here"
    )
    return (
        "launcher = slurm, but there is no sbatch on PATH; type this where Slurm's commands"
        f" are. {instead}"
    )


def files(plan: Plan, folder: Path) -> Problems:
    path = env_file(plan, folder)
    if not path.is_file():
        yield (
            f"launcher.env_file = {plan.config.launcher.env_file or path}: no such file; null"
            " is slurm/env.sh"
        )


def container(plan: Plan, folder: Path) -> Problems:
    launcher = plan.config.launcher
    if not launcher.container_image:
        return
    image = launcher.container_image
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
    yield from containers.hidden(plan.config, folder, mounts)


def may_return(plan: Plan) -> Problems:
    if (
        plan.config.checkpoint.resume is Resume.never
        and plan.saves
        and plan.config.trainer.mode is Mode.train
    ):
        yield (
            "checkpoint.resume = never would refuse the job when it returns to its run_dir; use"
            " auto, in a run_dir that holds no run yet"
        )


def array(plan: Plan, words: list[str]) -> Problems:
    """Tasks of an array: one at a time (%1) each goes on with the run of the one before; side by side they are runs."""
    asked = plan.config.launcher.sbatch_args.get("array")
    if (
        asked is not None
        and not str(asked).endswith("%1")
        and not any(TASK in word for word in words)
    ):
        yield (
            f"launcher.sbatch_args.array = {asked} starts jobs side by side in one run_dir; type"
            f" run_dir='runs/${{name}}-${{oc.env:{TASK},0}}', or array={asked}%1 for one after the"
            " other"
        )


def fits(plan: Plan, nodes: list[Node]) -> Problems:
    """Whether the cluster has the partition, its nodes the GPUs, and the partition the nodes."""
    launcher = plan.config.launcher
    trainer = plan.config.trainer
    partitions = list(dict.fromkeys(node.partition for node in nodes))
    asked = launcher.partition
    if asked is None:
        asked = next((node.partition for node in nodes if node.is_default), None)
        if asked is None:
            yield (
                "launcher.partition = null, but this cluster has no default; use"
                f" {' or '.join(partitions)}"
            )
            return
    named = asked.split(",")  # Slurm takes the first that can start it
    unknown = [name for name in named if name not in partitions]
    for name in unknown:
        near = get_close_matches(name, partitions, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        yield (
            f"launcher.partition = {name}: {hint}the partitions of this cluster are"
            f" {', '.join(partitions)}"
        )
    inside = [node for node in nodes if node.partition in named]
    if unknown or not inside:
        return
    yield from within_limit(plan, inside)
    names = {node.name for node in inside}
    wanted = gpus_per_node(plan)
    most = max(node.gpus for node in inside)
    where = f"partition {asked}"
    if wanted > most:
        has = (
            f"a node of {where} has {most} at most; use trainer.devices={most} and more nodes"
            if most
            else (f"no node of {where} has any; use")
        )
        instead = f"{', or' * bool(most)} another launcher.partition"
        yield f"launcher.gpus_per_node = {wanted} ({_source(plan)}): {has}{instead}"
    elif trainer.num_nodes > len(fitting := {node.name for node in inside if node.gpus >= wanted}):
        of = f" with {wanted} GPUs" if wanted and fitting != names else ""
        yield (
            f"trainer.num_nodes = {trainer.num_nodes}, but {where} has {len(fitting)}"
            f" nodes{of}; use {len(fitting)}"
        )


def within_limit(plan: Plan, inside: list[Node]) -> Problems:
    """Many clusters take a job that is too long, and let it wait for ever."""
    asked = plan.config.launcher.time
    limits = {node.limit: seconds_of(node.limit) or math.inf for node in inside}
    longest = max(limits, key=limits.get)
    if asked is not None and (seconds_of(asked) or 0) > limits[longest]:
        where = "/".join(dict.fromkeys(node.partition for node in inside))
        yield (
            f"launcher.time = {asked} is more than partition {where} allows; use at most {longest}"
        )


def _source(plan: Plan) -> str:
    return "as typed" if plan.config.launcher.gpus_per_node is not None else "from trainer.devices"
