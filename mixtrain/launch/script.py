"""Render a job's script: slurm/train.sbatch with its directives and settings filled in. No torch.

Rule: the submitted script is the file that is also used by hand, and contains every decision: the
same plan, overrides and folder give the same bytes.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from mixtrain.config.choices import Accelerator
from mixtrain.config.key_effects import show, value_of
from mixtrain.config.plan import Plan
from mixtrain.config.sbatch_directive import MARK, directive
from mixtrain.config.schema import Config, legal_keys
from mixtrain.config.user_conf import split_flag
from mixtrain.launch.containers import mounts_of
from mixtrain.paths import ROOT

TEMPLATE = ROOT / "slurm" / "train.sbatch"
ENV_FILE = ROOT / "slurm" / "env.sh"
KEYS = {
    "job-name": "name",
    "partition": "launcher.partition",
    "account": "launcher.account",
    "time": "launcher.time",
    "chdir": "the folder",
    "output": "the folder and run_dir",
}
CHANGING = ("${now:", "${hydra:")  # in an override: its value changes each time it is composed


def render(plan: Plan, overrides: list[str], folder: Path, template: Path = TEMPLATE) -> str:
    """Return the script of a submission from `folder`, which relative paths refer to.

    UserError if a directive cannot hold its value.
    """
    head, defaults, body = split_template(template.read_text())
    directives = {**defaults, **directives_of(plan, folder)}
    for flag, value in plan.config.launcher.sbatch_args.items():
        directives[flag_name(flag)] = value
    lines = [
        directive(flag, value, KEYS.get(flag, f"launcher.sbatch_args.{flag}"))
        for flag, value in directives.items()
        if value not in (None, False)
    ]
    comment = "\n# filled in by mixtrain for this submission\n"
    return "".join([*head, *lines, comment, *_settings(plan, overrides, folder), *body])


def split_template(text: str) -> tuple[list[str], dict[str, str | bool], list[str]]:
    """Return (lines before the directives, directives, lines after them) of a template."""
    lines = text.splitlines(keepends=True)
    marked = [number for number, line in enumerate(lines) if line.startswith(MARK)]
    directives: dict[str, str | bool] = {}
    for number in marked:
        argument = lines[number].removeprefix(MARK).strip().removeprefix("--")
        flag, has_value, value = argument.partition("=")
        directives[flag] = value if has_value else True
    return lines[: marked[0]], directives, lines[marked[-1] + 1 :]


def directives_of(plan: Plan, folder: Path) -> dict[str, str | int | None]:
    """Return sbatch's flags from the plan and the launcher's keys."""
    config = plan.config
    return {
        "job-name": config.name,
        "nodes": config.trainer.num_nodes,
        "partition": config.launcher.partition,
        "account": config.launcher.account,
        "time": config.launcher.time,
        "gpus-per-node": gpus_per_node(plan) or None,
        "chdir": str(folder),
        # sbatch fills in %j, the job's number
        "output": str(folder / config.run_dir / "logs").replace("%", "%%") + "/job_%j.log",
    }


def gpus_per_node(plan: Plan) -> int:
    """Return the GPUs per node to request from Slurm."""
    trainer = plan.config.trainer
    given = plan.config.launcher.gpus_per_node
    if given is not None:
        return given
    return trainer.devices if trainer.accelerator is Accelerator.gpu else 0


def flag_name(flag: str) -> str:
    """Return sbatch's name of a flag: `job_name` and `job-name` are the same."""
    return flag.replace("_", "-")


def env_file(plan: Plan, folder: Path) -> Path:
    given = plan.config.launcher.env_file
    return folder / given if given else ENV_FILE


def pin_values(overrides: list[str], config: Config) -> list[str]:
    """Return the overrides with the current values where composing them again would change them."""
    return [
        _pin_value(override, config) if any(text in override for text in CHANGING) else override
        for override in overrides
    ]


def _pin_value(override: str, config: Config) -> str:
    key = override.partition("=")[0].lstrip("+")
    # an override without a legal key stays unchanged, and the job refuses it
    return f"{key}={_as_typed(value_of(config, key))}" if key in legal_keys() else override


def _as_typed(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_as_typed, value))}]"
    return "'" + value.replace("'", "\\'") + "'" if isinstance(value, str) else show(value)


def _settings(plan: Plan, overrides: list[str], folder: Path) -> list[str]:
    """Return lines that set what the script determines itself when used by hand."""
    image = plan.config.launcher.container_image
    python = "python" if image else sys.executable
    lines = [
        f"MIXTRAIN_ROOT={shlex.quote(str(ROOT))}\n",
        f"MIXTRAIN_PYTHON={shlex.quote(python)}\n",
        f"MIXTRAIN_ENV_FILE={shlex.quote(str(env_file(plan, folder)))}\n",
    ]
    if image:
        _, config_dir = split_flag(overrides)
        mounts = mounts_of(plan.config, folder, ROOT, config_dir)
        flags = [
            f"--container-image={image}",
            f"--container-workdir={folder}",
            "--no-container-mount-home",
            f"--container-mounts={','.join(map(str, mounts))}",
        ]
        quoted_flags = [f"    {shlex.quote(flag)}\n" for flag in flags]
        lines += ["mixtrain_container=(\n", *quoted_flags, ")\n"]
    quoted = [shlex.quote(override) for override in pin_values(overrides, plan.config)]
    return [*lines, " \\\n    ".join(["set --", *quoted]) + "\n"]
