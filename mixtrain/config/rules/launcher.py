"""Rules about the launcher keys that need no answer of a cluster. No torch."""

from __future__ import annotations

import math
import re

from mixtrain.config.choices import Accelerator, Mode
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems
from mixtrain.config.sbatch_directive import unquotable

# Slurm's six forms of a time
TIME = re.compile(
    r"(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?"
    r"|(?P<a>\d+)(?::(?P<b>\d+)(?::(?P<c>\d+))?)?"
)
WARNING_S = 300  # --signal of slurm/train.sbatch
START_S = 30  # the shortest time from a job's start to its first step
# flags of sbatch that other keys set
KEY_OF_FLAG = {
    "partition": "launcher.partition",
    "account": "launcher.account",
    "time": "launcher.time",
    "gpus-per-node": "launcher.gpus_per_node",
    "nodes": "trainer.num_nodes",
    "ntasks": "trainer.devices",
    "ntasks-per-node": "trainer.devices",
    "container-image": "launcher.container_image",
    "container-mounts": "launcher.container_mounts",
    "output": "run_dir, whose logs/ the job's log goes to",
    "error": "run_dir, whose logs/ the job's log goes to",
    "chdir": "run_dir and other paths, or submit from there",
}
# flags that run another program or change what sbatch prints
FORBIDDEN = ("wrap", "test-only", "parsable", "wait", "help", "version")


def seconds_of(time: str) -> float | None:
    """Return the seconds of a Slurm time, inf for UNLIMITED, None for invalid text."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = TIME.fullmatch(time)
    if not match:
        return None
    field = {name: int(value or 0) for name, value in match.groupdict().items()}
    if match["days"] is not None:
        return ((field["days"] * 24 + field["dh"]) * 60 + field["dm"]) * 60 + field["ds"]
    if match["c"] is not None:
        return (field["a"] * 60 + field["b"]) * 60 + field["c"]
    return field["a"] * 60 + field["b"]


def time_is_valid(plan: Plan) -> Problems:
    time = plan.config.launcher.time
    if time is not None and seconds_of(time) is None:
        yield (
            f"launcher.time = {time} is not a Slurm time; use minutes (90), 12:00:00 (hours), or"
            " 2-00:00:00 (days)"
        )


def time_leaves_room_to_train(plan: Plan) -> Problems:
    """Refuse a limit within the stop signal's lead time: each job would train for one step only."""
    time = plan.config.launcher.time
    warning = warning_seconds(plan)
    seconds = seconds_of(time) if time is not None else None
    if seconds is None or plan.config.trainer.mode is Mode.preflight:
        return
    if seconds < warning + START_S:
        yield (
            f"launcher.time = {time} is {seconds:.0f} s, but the run is asked to stop {warning} s"
            f" before the limit; use at least {math.ceil((warning + START_S) / 60)} (minutes), or"
            " later: launcher.sbatch_args.signal=USR1@60"
        )


def warning_seconds(plan: Plan) -> int:
    signal = plan.config.launcher.sbatch_args.get("signal", f"@{WARNING_S}")
    match = re.search(r"@(\d+)$", str(signal))
    return int(match[1]) if match else 60  # Slurm's default


def gpus_cover_the_ranks(plan: Plan) -> Problems:
    gpus = plan.config.launcher.gpus_per_node
    trainer = plan.config.trainer
    if trainer.accelerator is Accelerator.gpu and gpus is not None and gpus < trainer.devices:
        yield (
            f"launcher.gpus_per_node = {gpus} must be at least trainer.devices ="
            f" {trainer.devices}, which null gives"
        )


def sbatch_flags_are_free(plan: Plan) -> Problems:
    for flag, value in plan.config.launcher.sbatch_args.items():
        key = f"launcher.sbatch_args.{flag}"
        name = str(flag).replace("_", "-")
        items = value if isinstance(value, list) else [value]
        if name.startswith("-") or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            yield f"{key} must be the long name of a flag of sbatch, without dashes before it"
        elif name in KEY_OF_FLAG:
            yield f"{key} has a key of its own; set {KEY_OF_FLAG[name]}"
        elif name in FORBIDDEN:
            yield f"{key} would change what the job or sbatch does; take it out"
        elif any(isinstance(item, float) for item in items):
            yield f"{key} = {value} is a number where sbatch reads a text; quote it"
        elif character := unquotable(value):
            yield f"{key} has {character}, which no #SBATCH line can contain; take it out"


def slurm_names_are_plain(plan: Plan) -> Problems:
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
    time_is_valid,
    time_leaves_room_to_train,
    gpus_cover_the_ranks,
    sbatch_flags_are_free,
    slurm_names_are_plain,
    mounts_need_an_image,
]
