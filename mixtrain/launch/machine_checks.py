"""Check this machine: GPUs, packages, files, the run directory, how ranks were started. No torch.

Rule: plan mode makes no check of this module, and no check writes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mixtrain.checkpoint import same_model, same_tokenizer
from mixtrain.checkpoint.directory import MARGIN, newest, steps_in
from mixtrain.config.choices import (
    Accelerator,
    DataKind,
    Dispatcher,
    LauncherType,
    Resume,
    TransformerImpl,
)
from mixtrain.config.contradictions import shrink_overrides
from mixtrain.config.plan import Plan
from mixtrain.data.check import check_files
from mixtrain.errors import UserError
from mixtrain.launch.checks import submission_problems
from mixtrain.launch.choose import chosen_launcher
from mixtrain.launch.containers import mounts_of, with_host_paths
from mixtrain.launch.script import ROOT
from mixtrain.system.rank_identity import Identity
from mixtrain.training.run_directory import directory_problems

Problems = Iterator[str]


def machine_problems(plan: Plan, identity: Identity | None, overrides: list[str]) -> list[str]:
    """Return why this machine cannot run the plan; `identity` is None in the launcher."""
    if identity is None and chosen_launcher(plan) is LauncherType.slurm:
        return job_problems(plan, overrides)
    problems = [
        *package_problems(plan),
        *flex_package_problems(plan),
        *gpu_problems(plan, overrides),
        *data_problems(plan, every_entry=identity is None),
        *cache_problems(plan),
        *weights_problems(plan),
    ]
    if identity is None:
        problems += [*directory_problems(plan), *multi_node_problems(plan, overrides)]
    else:
        problems += environment_problems(plan, identity)
        problems += directory_problems(plan) if identity.rank == 0 else []
    # if this machine cannot run the plan, the space on its disk does not matter
    return problems or [*disk_space_problems(plan)]


def job_problems(plan: Plan, overrides: list[str]) -> list[str]:
    """Return why the plan should not be submitted; this machine may differ from the nodes."""
    folder = Path.cwd()
    problems = submission_problems(plan, overrides, folder)
    if plan.config.launcher.container_image:
        with suppress(UserError):  # submission_problems reports an invalid mount
            mounts = mounts_of(plan.config, folder, ROOT)
            plan = replace(plan, config=with_host_paths(plan.config, folder, mounts))
    problems += [
        *data_problems(plan, every_entry=True),
        *cache_problems(plan),
        *weights_problems(plan),
        *directory_problems(plan),
    ]
    return problems or [*disk_space_problems(plan)]


def package_problems(plan: Plan) -> Problems:
    needed = plan.config.model.transformer_impl is TransformerImpl.transformer_engine
    if needed and not installed("transformer_engine"):
        yield (
            "model.transformer_impl = transformer_engine (which fp8 needs too), but the package"
            " transformer-engine is not installed; pip install mixtrain[gpu], or"
            " model.transformer_impl=torch"
        )


def flex_package_problems(plan: Plan) -> Problems:
    flex = plan.config.dispatcher.moe_token_dispatcher_type is Dispatcher.flex
    if flex and not installed("deep_ep"):
        yield (
            "dispatcher.moe_token_dispatcher_type = flex, but the package deep_ep (DeepEP and"
            " HybridEP) is not installed; install it, or dispatcher=alltoall"
        )


def gpu_problems(plan: Plan, overrides: list[str]) -> Problems:
    trainer = plan.config.trainer
    present = gpu_count()
    if trainer.accelerator is Accelerator.gpu and present < trainer.devices:
        on_cluster = ""
        if shutil.which("sbatch"):
            command = train_command([*overrides, "launcher.type=slurm"])
            on_cluster = f"; on the cluster: {command}"
        yield (
            f"trainer.accelerator = gpu with trainer.devices = {trainer.devices}, but this machine"
            f" has {present} GPUs. To see the plan alone:"
            f" {train_command(plan_overrides(overrides))}; to try the code path on this CPU:"
            f" {train_command(cpu_overrides(overrides))}{on_cluster}"
        )


def plan_overrides(overrides: list[str]) -> list[str]:
    return [*_without(overrides, "trainer.mode"), "trainer.mode=plan"]


def cpu_overrides(overrides: list[str]) -> list[str]:
    """Return overrides for the same run on this CPU: a recipe gets +shrink=laptop.

    Overrides that would take precedence over the smaller sizes are left out.
    """
    overrides = _without(
        overrides, "shrink", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"
    )
    if not any(_key(override) == "recipe" for override in overrides):
        return [*overrides, "trainer.accelerator=cpu"]
    shrunk = []
    for override in _without(overrides, "trainer"):  # the shrink sets a trainer
        # the shrink has a small vocabulary, which does not fit the user's data
        if _key(override).split(".")[0] == "data":
            continue
        shrunk.append(override)
        if _key(override) == "recipe":
            shrunk.append("+shrink=laptop")
    return [*shrunk, *shrink_overrides(shrunk, "laptop")]


def _without(overrides: list[str], *keys: str) -> list[str]:
    return [override for override in overrides if _key(override) not in keys]


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+")


def train_command(overrides: list[str]) -> str:
    return f"python train.py {shlex.join(overrides)}"


def multi_node_problems(plan: Plan, overrides: list[str]) -> Problems:
    trainer = plan.config.trainer
    if trainer.num_nodes > 1:
        yield (
            f"trainer.num_nodes = {trainer.num_nodes}, but nothing has started the ranks of the"
            " other nodes, and there is no sbatch on PATH to submit a job with. On each node type:"
            f" {torchrun_command(plan, overrides)}"
        )


def torchrun_command(plan: Plan, overrides: list[str]) -> str:
    """Return the command to type on every node, outside Slurm."""
    trainer = plan.config.trainer
    return (
        f"torchrun --nnodes {trainer.num_nodes} --nproc-per-node {trainer.devices} --rdzv-backend"
        f" c10d --rdzv-endpoint FIRST_NODE:29500 train.py {shlex.join(overrides)}"
    )


def data_problems(plan: Plan, every_entry: bool) -> Problems:
    """Check the data and its tokenizer; `every_entry` of the index files, or only the last one.

    The launcher checks every entry. Ranks started by torchrun or srun leave that to the first rank.
    """
    data = plan.config.data
    if data.kind is not DataKind.indexed:
        return
    tokenizer = Path(data.tokenizer)
    yield from check_files(
        data.data_path,
        tokenizer,
        plan.config.model.vocab_size,
        data.split,
        plan.samples,
        seq_length=data.seq_length,
        every_entry=every_entry,
    )
    # check_files or the first rank reports a file that cannot be read
    with suppress(UserError):
        if problem := same_tokenizer.problem(plan.config, tokenizer):
            yield problem


def cache_problems(plan: Plan) -> Problems:
    """Check that the data cache exists or can be made; a complete one need not be writable."""
    directory = plan.config.data.path_to_cache
    if os.path.isdir(directory):
        return
    try:
        os.lstat(directory)
        wrong = "it is not a directory"
    except FileNotFoundError:
        parent = next(path for path in Path(os.path.abspath(directory)).parents if path.is_dir())
        wrong = None if os.access(parent, os.W_OK | os.X_OK) else f"{parent} cannot be written"
    except OSError as error:
        wrong = error.strerror
    if wrong:
        yield (
            f"data.path_to_cache = {directory} cannot be made ({wrong}); give a directory that"
            " can be written"
        )


def disk_space_problems(plan: Plan) -> Problems:
    """Check that run_dir's disk has room for one more checkpoint: the new one precedes deletion."""
    directory = Path(os.path.abspath(plan.config.run_dir))
    existing = next((path for path in (directory, *directory.parents) if os.path.isdir(path)), None)
    if not plan.saves or existing is None:
        return
    disk = shutil.disk_usage(existing)
    needed = plan.checkpoint_bytes
    if disk.total and disk.free < needed + MARGIN:
        yield (
            f"run_dir = {plan.config.run_dir}: a checkpoint takes {needed:,} bytes and a margin of"
            f" {MARGIN:,}, but {disk.free:,} are free on its disk; free some, give a run_dir on"
            " another disk, or checkpoint=none"
        )


def weights_problems(plan: Plan) -> Problems:
    settings = plan.config.checkpoint
    if settings.load_weights is None:
        return
    checkpoint = newest(settings.load_weights)
    if checkpoint is None:
        wrong = "is not a directory"
        if os.path.isdir(settings.load_weights):
            wrong = "is not a checkpoint (iter_NNNNNNN, release) or a directory of some"
        yield f"checkpoint.load_weights = {settings.load_weights} {wrong}"
        return
    resumes = settings.resume is not Resume.never and steps_in(plan.config.run_dir)
    if not resumes:
        with suppress(ValueError):  # the ranks report a missing or damaged run_state.json
            yield from same_model.problems(plan.config, checkpoint)


def environment_problems(plan: Plan, identity: Identity) -> Problems:
    """Check the world size against the configuration, and the rendezvous address."""
    if identity.world_size != plan.world_size:
        yield (
            f"{identity.world_size} ranks were started, but trainer.devices * trainer.num_nodes ="
            f" {plan.world_size}; start {plan.world_size}, or change trainer.devices"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if identity.rendezvous == "env://" and missing:
        yield (
            f"the environment has RANK = {identity.rank}, but no {' and no '.join(missing)} for the"
            " ranks to meet at; set them as torchrun does, or unset RANK and train.py starts its"
            " ranks itself"
        )


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def gpu_count() -> int:
    """Return how many NVIDIA GPUs this process may use: device files and CUDA_VISIBLE_DEVICES."""
    names = os.listdir("/dev") if os.path.isdir("/dev") else []
    present = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in names)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    devices = [device for device in visible.split(",") if device.strip() not in ("", "-1")]
    return min(present, len(devices))
