"""What the tests without torch share: compose, check and plan in this process as train.py does, or
run train.py.

Hydra takes a tenth of a second to compose, so where a test is about numbers Hydra composes only the
groups, once, and single keys are set in a copy of the result. test_compose.py holds the two ways
against each other.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from mixtrain.config.compose import CONF, compose
from mixtrain.config.plan import Plan, derive, resolve
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import from_hydra
from mixtrain.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
STARTED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def tree_of(*overrides: str, conf: Path = CONF) -> DictConfig:
    """What Hydra composes of a command line whose words are all right."""
    ((job,), problems) = compose(list(overrides), conf)
    assert not problems, problems
    return job.tree


def problems_of(*overrides: str, conf: Path = CONF) -> list[str]:
    """Every problem of a command line, or none: all of it through Hydra."""
    try:
        ((job,), problems) = compose(list(overrides), conf)
        make_plan(from_hydra(job.tree, problems), None, problems)
    except UserError as error:
        return list(error.problems)
    return []


def quick_tree_of(*overrides: str) -> DictConfig:
    """What Hydra would compose of a command line whose words are all right."""
    groups = tuple(word for word in overrides if (CONF / word.lstrip("+").split("=")[0]).is_dir())
    tree = copy.deepcopy(_groups(groups))
    for word in overrides:
        if word not in groups:
            override = OverridesParser.create().parse_override(word)
            OmegaConf.update(
                tree,
                override.key_or_group,
                override.value(),
                force_add="extra" in word or "sbatch_args" in word,
            )
    return tree


@cache
def _groups(words: tuple[str, ...]) -> DictConfig:
    return tree_of(*words)


@cache
def config_of(*overrides: str) -> Config:
    """The typed configuration of a command line; UserError if a value does not fit."""
    return from_hydra(quick_tree_of(*overrides))


def plan_of(*overrides: str) -> Plan:
    """The plan of a command line; UserError if it breaks a rule."""
    return make_plan(config_of(*overrides))


def derived(*overrides: str) -> Plan:
    """The plan's numbers alone: no rule is asked."""
    return derive(resolve(config_of(*overrides)))


def problems_in(tree: DictConfig, changes: dict[str, object] | None = None) -> list[str]:
    """Every problem of a composed tree with some keys changed."""
    tree = copy.deepcopy(tree)
    for key, value in (changes or {}).items():
        OmegaConf.update(tree, key, value, force_add=True)
    try:
        make_plan(from_hydra(tree))
    except UserError as error:
        return list(error.problems)
    return []


def unstarted_environment() -> dict[str, str]:
    """This environment, as if nobody had started ranks (the tests may run in a Slurm job), without
    a GPU and Slurm.
    """
    started = [
        name for name in os.environ if name in STARTED_BY or name.startswith(("SLURM", "MIXTRAIN"))
    ]
    kept = {name: value for name, value in os.environ.items() if name not in started}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "PATH": path_without_slurm()}


def path_without_slurm() -> str:
    """PATH without the folders that contain sbatch: the tests assume a machine without Slurm."""
    return os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not os.path.exists(os.path.join(folder, "sbatch"))
    )


def run_train(
    *overrides: str, cwd: Path = ROOT, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python train.py overrides` in `cwd`, as a user without a GPU types it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=cwd,
        env=unstarted_environment() | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
