"""From the words of a command line to composed configurations, with every wrong word found. No torch.

Rule: Hydra stops at the first unknown override, with exit code 1 and no hint, and silently takes `+recipe=x` for a
plain key when no such group is found. So the overrides are held against the tree of groups and keys first.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from pathlib import Path
from typing import NamedTuple

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixtrain import scratch
from mixtrain.characters import CONTROL
from mixtrain.config import FREE, legal_keys, unknown_key
from mixtrain.errors import UserError

CONF = Path(__file__).resolve().parent.parent / "conf"
ADDED_GROUPS = ("recipe", "shrink")  # not in config.yaml's defaults list: given with a plus
SCENARIOS = "bench"  # a folder in conf/ that is no group


class NamedRecipe(NamedTuple):
    """A recipe as it stands, with the shrink that was asked for: what the other overrides are held against."""

    name: str
    tree: DictConfig


class Composed(NamedTuple):
    """What one job of a command line composes to, and the overrides that did it (a sweep has several jobs)."""

    tree: DictConfig
    overrides: list[str]
    recipe: NamedRecipe | None = None


def compose(argv: list[str], conf: Path = CONF) -> tuple[list[Composed], list[str]]:
    """The jobs that the words `argv` compose to, without their wrong overrides, and what is wrong with those.

    `--help` and `--cfg job` are Hydra's own: they print and compose to no job. Raises UserError if nothing composes.
    """
    arguments = get_args_parser().parse_intermixed_args(argv)  # flags may stand between overrides
    kept, problems = check_overrides(arguments.overrides, conf, arguments.multirun)
    words = [word for word in argv if word not in arguments.overrides] + kept
    jobs = _hydra(words, conf, problems)
    if problems and not jobs:  # --cfg job with a wrong override
        raise UserError(*problems)
    return jobs, problems


def check_overrides(overrides: list[str], conf: Path = CONF, multirun: bool = False) -> tuple[list[str], list[str]]:
    """(the overrides that Hydra can take, one problem for each of the others)."""
    kept, problems, parsed = [], [], []
    for text in overrides:
        if CONTROL.search(text):
            problems.append(f"{text} has a control character; take it out")
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            reason = str(error).strip().splitlines()[0]
            problems.append(f"{text} cannot be read ({reason}); an override is key=value, quoted where it has spaces")
            continue
        parsed.append(override)
        if problem := _problem(override, conf):
            problems.append(problem)
        elif override.is_sweep_override() and not multirun:
            key, _, values = text.partition("=")
            problems.append(f"{text} reads as a sweep; type \"{key}='{values}'\" for one text, or add --multirun")
        elif override.key_or_group.startswith(FREE) and override.type is OverrideType.CHANGE:
            kept.append(f"++{text}")  # a free mapping: Hydra wants to be told that the key is new
        else:
            kept.append(text)
    return kept, problems + _order(parsed)


def options(group: str, conf: Path = CONF) -> list[str]:
    """The options of a group: `options("router")` is the file names in conf/router."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def _problem(override: Override, conf: Path) -> str | None:
    """What is wrong with one override, or None."""
    key, added = override.key_or_group, override.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
    if not key:
        return f"{override.input_line} has no key; an override is key=value"
    if key == "hydra" or key.startswith("hydra.") or key.startswith("hydra/"):
        return None
    if override.type is OverrideType.DEL:
        return f"{override.input_line}: no key can be taken away; set it to null where null is allowed"
    if key == SCENARIOS:
        return f"{override.input_line}: conf/bench is the benchmark's; type python tools/bench.py scenario=NAME"
    if key in ADDED_GROUPS or (conf / key).is_dir():
        return _group_problem(override, added, conf)
    if key in legal_keys() or key.startswith(tuple(f"{free}." for free in FREE)):
        plain_add = override.type is OverrideType.ADD and key in legal_keys()
        return f"+{key}: the key is there already; type it without the plus" if plain_add else None
    return unknown_key(key)


def _group_problem(override: Override, added: bool, conf: Path) -> str | None:
    group, chosen, known = override.key_or_group, override.value(), options(override.key_or_group, conf)
    if not known:
        return f"{override.input_line}: there is no folder of options {conf / group}; is the checkout complete?"
    if group in ADDED_GROUPS and not added:
        return f"{group}={chosen}: {group} is not part of the default; type +{group}={chosen}"
    if group not in ADDED_GROUPS and added:
        return f"+{group}={chosen}: {group} has a default; type {group}={chosen}"
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return None  # a pattern: Hydra takes the options that fit it
    if override.is_sweep_override():
        chosen = [str(choice) for choice in override.sweep_iterator()]
    wrong = [name for name in (chosen if isinstance(chosen, list) else [chosen]) if name not in known]
    if not wrong:
        return None
    near = difflib.get_close_matches(str(wrong[0]), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={wrong[0]}: {hint}the options of {group} are {', '.join(known)}"


def _order(parsed: list[Override]) -> list[str]:
    """`+shrink` before `+recipe` would have its sizes overwritten by the recipe."""
    groups = [override.key_or_group for override in parsed]
    if "shrink" in groups and "recipe" in groups[groups.index("shrink") :]:
        return ["+shrink stands before +recipe, whose sizes would win; type +recipe=... first"]
    return []


def _hydra(words: list[str], conf: Path, known: list[str]) -> list[Composed]:
    """Let Hydra itself compose. Its own errors go to stderr as it words them, then end in a UserError."""
    jobs: list[Composed] = []

    @hydra.main(version_base="1.3", config_path=str(conf), config_name="config")
    def collect(tree: DictConfig) -> None:
        overrides = HydraConfig.get().overrides.task  # unresolved: the ${...} in them is the tree's
        if "${hydra:" in str(OmegaConf.to_container(tree, resolve=False)["run_dir"]):
            with contextlib.suppress(OmegaConfBaseException):  # Config.from_hydra says what cannot be resolved
                tree.run_dir = tree.run_dir  # now: ${hydra:job.num} has no value once Hydra is through
        jobs.append(Composed(tree, OmegaConf.to_container(overrides, resolve=False)))  # its recipe: below

    with scratch.folder() as folder:  # a sweep leaves a multirun.yaml somewhere
        before, sys.argv = sys.argv, [sys.argv[0], *words, f"hydra.sweep.dir='{folder}'"]
        try:
            collect()
        except SystemExit as stop:
            if stop.code:
                raise UserError(*known, "Hydra could not compose this configuration: its reason is above") from None
        finally:
            sys.argv = before
    return [job._replace(recipe=_recipe(job.overrides, conf)) for job in jobs]


def _recipe(overrides: list[str], conf: Path) -> NamedRecipe | None:
    """The recipe among a job's overrides, composed without the others; None where the job names none."""
    groups = [text for text in overrides if text.split("=")[0].lstrip("+") in ADDED_GROUPS]
    names = [text.split("=", 1)[1] for text in groups if text.startswith("+recipe=")]
    if not names:
        return None
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        return NamedRecipe(names[0], hydra.compose("config", overrides=groups))
