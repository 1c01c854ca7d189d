"""The text of a job: slurm/train.sbatch with its directives and settings filled in. No torch.

Rule: what is sent is the file that is also used by hand, and nothing is decided here that a reader
of the text cannot see: the same plan, words and folder give the same bytes.
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
from mixtrain.launch.containers import mounts_of

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "slurm" / "train.sbatch"
ENV_FILE = ROOT / "slurm" / "env.sh"
KEYS = {
    "job-name": "name", "partition": "launcher.partition", "account": "launcher.account", "time": "launcher.time",
    "chdir": "the folder", "output": "the folder and run_dir",
}  # fmt: skip
NOW = ("${now:", "${hydra:")  # in a word: another value every time that it is composed


def render(plan: Plan, words: list[str], folder: Path, template: Path = TEMPLATE) -> str:
    """The script of a submission from `folder`, to which relative paths of the configuration belong.

    UserError if a directive cannot hold its value.
    """
    head, ours, body = split(template.read_text())
    directives = {**ours, **directives_of(plan, folder)}
    for flag, value in plan.config.launcher.sbatch_args.items():
        directives[dashed(flag)] = value
    lines = [
        directive(flag, value, KEYS.get(flag, f"launcher.sbatch_args.{flag}"))
        for flag, value in directives.items()
        if value not in (None, False)
    ]
    return "".join(
        [
            *head,
            *lines,
            "\n# filled in by mixtrain for this submission\n",
            *_settings(plan, words, folder),
            *body,
        ]
    )


def split(text: str) -> tuple[list[str], dict[str, str | bool], list[str]]:
    """(lines before the directives, the directives, lines after them) of a template."""
    lines = text.splitlines(keepends=True)
    marked = [number for number, line in enumerate(lines) if line.startswith(MARK)]
    found: dict[str, str | bool] = {}
    for number in marked:
        flag, has_value, value = (
            lines[number].removeprefix(MARK).strip().removeprefix("--").partition("=")
        )
        found[flag] = value if has_value else True
    return lines[: marked[0]], found, lines[marked[-1] + 1 :]


def directives_of(plan: Plan, folder: Path) -> dict[str, str | int | None]:
    """What the plan and the launcher's keys say to Slurm."""
    config = plan.config
    return {
        "job-name": config.name,
        "nodes": config.trainer.num_nodes,
        "partition": config.launcher.partition,
        "account": config.launcher.account,
        "time": config.launcher.time,
        "gpus-per-node": gpus_per_node(plan) or None,
        "chdir": str(folder),
        # %j: sbatch fills it in
        "output": str(folder / config.run_dir / "logs").replace("%", "%%") + "/job_%j.log",
    }


def gpus_per_node(plan: Plan) -> int:
    """GPUs to ask Slurm for, a node."""
    trainer = plan.config.trainer
    asked = plan.config.launcher.gpus_per_node
    if asked is not None:
        return asked
    return trainer.devices if trainer.accelerator is Accelerator.gpu else 0


def dashed(flag: str) -> str:
    """sbatch's name of a flag: `job_name` and `job-name` are one."""
    return flag.replace("_", "-")


def env_file(plan: Plan, folder: Path) -> Path:
    given = plan.config.launcher.env_file
    return folder / given if given else ENV_FILE


def pinned(words: list[str], config: Config) -> list[str]:
    """The words with the values of now, where composing them again would give others."""
    return [_pinned(word, config) if any(text in word for text in NOW) else word for word in words]


def _pinned(word: str, config: Config) -> str:
    key = word.partition("=")[0].lstrip("+")
    # else the job refuses it
    return f"{key}={_typed(value_of(config, key))}" if key in legal_keys() else word


def _typed(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return "'" + value.replace("'", "\\'") + "'" if isinstance(value, str) else show(value)


def _settings(plan: Plan, words: list[str], folder: Path) -> list[str]:
    """What the script finds out by itself when it is used by hand."""
    image = plan.config.launcher.container_image
    python = "python" if image else sys.executable
    lines = [
        f"MIXTRAIN_ROOT={shlex.quote(str(ROOT))}\n",
        f"MIXTRAIN_PYTHON={shlex.quote(python)}\n",
        f"MIXTRAIN_ENV_FILE={shlex.quote(str(env_file(plan, folder)))}\n",
    ]
    if image:
        flags = [
            f"--container-image={image}",
            f"--container-workdir={folder}",
            "--no-container-mount-home",
        ]
        flags += [
            f"--container-mounts={','.join(str(mount) for mount in mounts_of(plan.config, folder, ROOT))}"
        ]
        lines += [
            "mixtrain_container=(\n",
            *[f"    {shlex.quote(flag)}\n" for flag in flags],
            ")\n",
        ]
    quoted = [shlex.quote(word) for word in pinned(words, plan.config)]
    return [*lines, " \\\n    ".join(["set --", *quoted]) + "\n"]
