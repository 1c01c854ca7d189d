"""Rules about the launcher's keys, as far as no cluster need be asked. No torch."""

from __future__ import annotations

import math
import re

from mixtrain.config.choices import Accelerator, Mode
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems
from mixtrain.config.sbatch_directive import unquotable

# Slurm's six forms of a time, and UNLIMITED
TIME = re.compile(
    r"(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?|(?P<a>\d+)(?::(?P<b>\d+)(?::(?P<c>\d+))?)?"
)
WARNING_S = 300  # --signal of slurm/train.sbatch
TO_START_S = 30  # from a job's start to its first step, at the least
# flags of sbatch that are somebody else's to set
OWN = {
    "partition": "launcher.partition", "account": "launcher.account", "time": "launcher.time",
    "gpus-per-node": "launcher.gpus_per_node", "nodes": "trainer.num_nodes", "ntasks": "trainer.devices",
    "ntasks-per-node": "trainer.devices", "container-image": "launcher.container_image",
    "container-mounts": "launcher.container_mounts", "output": "run_dir, whose logs/ the job's log"
                                                               " goes to",
    "error": "run_dir, whose logs/ the job's log goes to", "chdir": "run_dir and other paths, or"
                                                                    " submit from there",
}  # fmt: skip
# another program than ours, or another answer
NEVER = ("wrap", "test-only", "parsable", "wait", "help", "version")


def seconds_of(time: str) -> float | None:
    """A time in Slurm's words in seconds, inf for UNLIMITED, None if it is none."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    found = TIME.fullmatch(time)
    if not found:
        return None
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    if found["days"] is not None:
        return ((part["days"] * 24 + part["dh"]) * 60 + part["dm"]) * 60 + part["ds"]
    if found["c"] is not None:
        return (part["a"] * 60 + part["b"]) * 60 + part["c"]
    return part["a"] * 60 + part["b"]


def time_is_slurms(plan: Plan) -> Problems:
    time = plan.config.launcher.time
    if time is not None and seconds_of(time) is None:
        yield (
            f"launcher.time = {time} is no time of Slurm's; use minutes (90), 12:00:00 (hours),"
            " or 2-00:00:00 (days)"
        )


def time_leaves_some_to_train(plan: Plan) -> Problems:
    """The run is asked to stop that many seconds before its limit: it would do a step, stop, return, and do a step."""
    time = plan.config.launcher.time
    warning = warning_seconds(plan)
    seconds = seconds_of(time) if time is not None else None
    if (
        seconds is None
        or plan.config.trainer.mode is Mode.preflight
        or seconds >= warning + TO_START_S
    ):
        return
    yield (
        f"launcher.time = {time} is {seconds:.0f} s, but the run is asked to stop {warning} s"
        f" before the limit; use at least {math.ceil((warning + TO_START_S) / 60)} (minutes), or"
        " later: launcher.sbatch_args.signal=USR1@60"
    )


def warning_seconds(plan: Plan) -> int:
    asked = plan.config.launcher.sbatch_args.get("signal", f"@{WARNING_S}")
    found = re.search(r"@(\d+)$", str(asked))
    return int(found[1]) if found else 60  # Slurm's own


def gpus_are_those_of_the_ranks(plan: Plan) -> Problems:
    asked = plan.config.launcher.gpus_per_node
    trainer = plan.config.trainer
    if trainer.accelerator is Accelerator.gpu and asked is not None and asked < trainer.devices:
        yield (
            f"launcher.gpus_per_node = {asked} must be at least trainer.devices ="
            f" {trainer.devices}; null is that"
        )


def flags_are_not_ours(plan: Plan) -> Problems:
    for flag, value in plan.config.launcher.sbatch_args.items():
        name = str(flag).replace("_", "-")
        if name.startswith("-") or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            yield (
                f"launcher.sbatch_args.{flag} must be the long name of a flag of sbatch,"
                " without dashes before it"
            )
        elif name in OWN:
            yield f"launcher.sbatch_args.{flag} has a key of its own; set {OWN[name]}"
        elif name in NEVER:
            yield f"launcher.sbatch_args.{flag} would make another job of it; take it out"
        elif any(
            isinstance(part, float) for part in (value if isinstance(value, list) else [value])
        ):
            yield (
                f"launcher.sbatch_args.{flag} = {value} is a number where sbatch reads a text;"
                " quote it"
            )
        elif has := unquotable(value):
            yield (
                f"launcher.sbatch_args.{flag} has {has}, which no #SBATCH line can hold; take"
                " it out"
            )


def names_are_names(plan: Plan) -> Problems:
    for key in ("partition", "account"):
        value = getattr(plan.config.launcher, key)
        if value is not None and not re.fullmatch(r"[\w.,@+-]+", value):
            yield f"launcher.{key} = {value} must be a name, without spaces and quotes"


def mounts_need_an_image(plan: Plan) -> Problems:
    launcher = plan.config.launcher
    if launcher.container_mounts and not launcher.container_image:
        yield (
            f"launcher.container_mounts = [{','.join(launcher.container_mounts)}], but"
            " launcher.container_image = null; set the image, or take them out"
        )


RULES = [
    time_is_slurms, time_leaves_some_to_train, gpus_are_those_of_the_ranks, flags_are_not_ours, names_are_names,
    mounts_need_an_image,
]  # fmt: skip
