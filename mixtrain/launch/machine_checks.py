"""Rules about this machine: GPUs, packages, files, the run directory, who starts the ranks. No torch.

Rule: nothing here is asked in plan mode, and nothing here writes.
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
from mixtrain.launch.choose import place
from mixtrain.launch.containers import as_on_host, mounts_of
from mixtrain.launch.script import ROOT
from mixtrain.system.rank_identity import Identity
from mixtrain.training.run_directory import directory_problems

Problems = Iterator[str]


def machine_problems(plan: Plan, identity: Identity | None, overrides: list[str]) -> list[str]:
    """Every reason why this machine cannot run the plan. `me`: this rank, None if the process is to start the ranks."""
    if identity is None and place(plan) is LauncherType.slurm:
        return job_problems(plan, overrides)
    problems = [*packages(plan), *flex_packages(plan)]
    problems += [
        *gpus(plan, overrides),
        *data_files(plan, identity is None),
        *cache(plan),
        *weights_to_load(plan),
    ]
    if identity is None:
        problems += [*directory_problems(plan), *several_nodes(plan, overrides)]
    else:
        problems += started_ranks(plan, identity)
        problems += directory_problems(plan) if identity.rank == 0 else []
    # the disk of a machine that cannot run it is not the one
    return problems or [*room_for_checkpoints(plan)]


def job_problems(plan: Plan, overrides: list[str]) -> list[str]:
    """Every reason why the plan should not be sent to Slurm from here: this machine need not be like the nodes."""
    folder = Path.cwd()
    problems = submission_problems(plan, overrides, folder)
    if plan.config.launcher.container_image:
        with suppress(UserError):  # a mount that cannot be read is said already
            mounts = mounts_of(plan.config, folder, ROOT)
            plan = replace(plan, config=as_on_host(plan.config, folder, mounts))
    problems += [
        *data_files(plan, True),
        *cache(plan),
        *weights_to_load(plan),
        *directory_problems(plan),
    ]
    return problems or [*room_for_checkpoints(plan)]


def packages(plan: Plan) -> Problems:
    model = plan.config.model
    if model.transformer_impl is TransformerImpl.transformer_engine and not installed(
        "transformer_engine"
    ):
        yield (
            "model.transformer_impl = transformer_engine (which fp8 needs too), but the package"
            " transformer-engine is not installed; pip install mixtrain[gpu], or"
            " model.transformer_impl=torch"
        )


def flex_packages(plan: Plan) -> Problems:
    flex = plan.config.dispatcher.moe_token_dispatcher_type is Dispatcher.flex
    if flex and not installed("deep_ep"):
        yield (
            "dispatcher.moe_token_dispatcher_type = flex, but the package deep_ep (DeepEP and"
            " HybridEP) is not installed; install it, or dispatcher=alltoall"
        )


def gpus(plan: Plan, overrides: list[str]) -> Problems:
    trainer = plan.config.trainer
    found = gpu_count()
    if trainer.accelerator is Accelerator.gpu and found < trainer.devices:
        yield (
            f"trainer.accelerator = gpu with trainer.devices = {trainer.devices}, but this machine"
            f" has {found} GPUs. To see the plan alone:"
            f" {train_command(plan_overrides(overrides))}; to try the code path on this CPU:"
            f" {train_command(cpu_overrides(overrides))}"
            + f"; on the cluster: {train_command([*overrides, 'launcher.type=slurm'])}"
            * (shutil.which("sbatch") is not None)
        )


def plan_overrides(overrides: list[str]) -> list[str]:
    return [*_without(overrides, "trainer.mode"), "trainer.mode=plan"]


def cpu_overrides(overrides: list[str]) -> list[str]:
    """The same on this CPU: a recipe shrunk, without the overrides that would win over its smaller sizes."""
    kept = _without(
        overrides, "shrink", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"
    )
    if not any(_key(text) == "recipe" for text in kept):
        return [*kept, "trainer.accelerator=cpu"]
    # the shrink has a trainer of its own
    shrunk = []
    kept = _without(kept, "trainer")
    for text in kept:
        # the vocabulary is shrunk too: not for tokens of one's own
        if _key(text).split(".")[0] != "data":
            shrunk += [text, "+shrink=laptop"] if _key(text) == "recipe" else [text]
    return [*shrunk, *shrink_overrides(shrunk, "laptop")]


def _without(overrides: list[str], *keys: str) -> list[str]:
    return [text for text in overrides if _key(text) not in keys]


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+")


def train_command(overrides: list[str]) -> str:
    return f"python train.py {shlex.join(overrides)}"


def several_nodes(plan: Plan, overrides: list[str]) -> Problems:
    trainer = plan.config.trainer
    if trainer.num_nodes > 1:
        yield (
            f"trainer.num_nodes = {trainer.num_nodes}, but nothing has started the ranks of the"
            " other nodes, and there is no sbatch on PATH to submit a job with. On each node type:"
            f" {torchrun_command(plan, overrides)}"
        )


def torchrun_command(plan: Plan, overrides: list[str]) -> str:
    """What to type on every node, outside Slurm."""
    trainer = plan.config.trainer
    return (
        f"torchrun --nnodes {trainer.num_nodes} --nproc-per-node {trainer.devices} --rdzv-backend"
        f" c10d --rdzv-endpoint FIRST_NODE:29500 train.py {shlex.join(overrides)}"
    )


def data_files(plan: Plan, every_entry: bool) -> Problems:
    """`every_entry` of the index files, before ranks are there; started ones leave it to the first of them, later."""
    data = plan.config.data
    if data.kind is DataKind.indexed:
        yield from check_files(
            data.data_path, Path(data.tokenizer), plan.config.model.vocab_size, data.split, plan.samples,
            seq_length=data.seq_length, every_entry=every_entry,
        )  # fmt: skip
        # what cannot be read is said by the line above, or by the first rank
        with suppress(UserError):
            if other := same_tokenizer.problem(plan.config, Path(data.tokenizer)):
                yield other


def cache(plan: Plan) -> Problems:
    """The directory of the data's index is there (one that has it all is only read), or can be made."""
    directory = plan.config.data.path_to_cache
    wrong = None
    if os.path.isdir(directory):
        return
    try:
        os.lstat(directory)
        wrong = "it is no directory"
    except FileNotFoundError:
        above = next(path for path in Path(os.path.abspath(directory)).parents if path.is_dir())
        wrong = None if os.access(above, os.W_OK | os.X_OK) else f"{above} cannot be written"
    except OSError as error:
        wrong = error.strerror
    if wrong:
        yield (
            f"data.path_to_cache = {directory} cannot be made ({wrong}); give a directory that"
            " can be written"
        )


def room_for_checkpoints(plan: Plan) -> Problems:
    """The disk of run_dir must hold one checkpoint more than there are: the old one goes when the new one is whole."""
    directory = Path(os.path.abspath(plan.config.run_dir))
    there = next((path for path in (directory, *directory.parents) if os.path.isdir(path)), None)
    if not plan.saves or there is None:
        return
    disk = shutil.disk_usage(there)
    needed = plan.checkpoint_bytes
    if disk.total and disk.free < needed + MARGIN:
        yield (
            f"run_dir = {plan.config.run_dir}: a checkpoint takes {needed:,} bytes and a margin of"
            f" {MARGIN:,}, but {disk.free:,} are free on its disk; free some, give a run_dir on"
            " another disk, or checkpoint=none"
        )


def weights_to_load(plan: Plan) -> Problems:
    given = plan.config.checkpoint.load_weights
    if given is None:
        return
    if there := newest(given):
        goes_on = plan.config.checkpoint.resume is not Resume.never and steps_in(
            plan.config.run_dir
        )
        if not goes_on:
            with suppress(ValueError):  # what is missing or damaged is said by the ranks
                yield from same_model.problems(plan.config, there)
        return
    what = (
        "is not a checkpoint (iter_NNNNNNN, release) or a directory of some"
        if os.path.isdir(given)
        else "is no directory"
    )
    yield f"checkpoint.load_weights = {given} {what}"


def started_ranks(plan: Plan, identity: Identity) -> Problems:
    """The launcher's world size and the configuration's must be one number, and torchrun's must say where to meet."""
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
    """NVIDIA GPUs this process may use: the driver's device files, less what CUDA_VISIBLE_DEVICES hides."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = (
        sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in os.scandir("/dev"))
        if _has_dev()
        else 0
    )
    if visible is None:
        return present
    return min(
        present, len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    )


def _has_dev() -> bool:
    return Path("/dev").is_dir()
