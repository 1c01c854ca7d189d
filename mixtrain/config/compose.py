"""Compose the overrides of a command line with Hydra and report every wrong override. No torch.

Rule: Hydra stops at the first unknown override, with exit code 1 and no hint, and silently reads
`+recipe=x` as a plain key if there is no such group. So this file checks the overrides against the
groups and keys before Hydra sees them.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixtrain.characters import CONTROL, escaped
from mixtrain.config import text_values, user_conf
from mixtrain.config.schema import FREE, legal_keys
from mixtrain.config.typed_config import leaves, unknown_key
from mixtrain.errors import UserError
from mixtrain.paths import CONF
from mixtrain.system import scratch, yaml_file

ADDED_GROUPS = ("recipe", "shrink")  # not in the defaults list of config.yaml: given with a plus
SCENARIOS = "bench"  # a folder of conf/ that is not a group
HYDRA_RESOLVER = re.compile(r"\$\{\s*hydra\s*:\s*([\w.]*)")  # has a value only while Hydra runs
# Hydra's output directories: unused here, so a temporary folder or the current one
HYDRA_OUTPUT = re.compile(r"(run|sweep)\b|runtime\.output_dir$")
DIRECTORY = (
    "Hydra only composes here; a run writes to run_dir, a sweep's to"
    " run_dir='runs/${name}-${hydra:job.num}'"
)
ONE_BY_ONE = (
    "the jobs of a sweep run one after the other; tools/submit.py --multirun sends them"
    " to Slurm all at once"
)
INEFFECTIVE = {  # Hydra settings without the documented effect here, and what to do instead
    "hydra.run.dir": DIRECTORY,
    "hydra.sweep": DIRECTORY,
    "hydra.output_subdir": DIRECTORY,
    "hydra.job.chdir": DIRECTORY,
    "hydra.launcher": ONE_BY_ONE,
    "hydra.sweeper": "a sweep tries every combination of the values in KEY=1,2; type those, and"
    " --multirun",
    "hydra.mode": "type --multirun for a sweep, nothing for one run",
    "hydra.job.env_set": "it reaches no rank; set the variable in the shell",
}


class NamedRecipe(NamedTuple):
    """A recipe with the given shrink but no other override; the run is compared with it."""

    name: str
    tree: DictConfig


class ComposedJob(NamedTuple):
    """The configuration of one job and its overrides; a sweep has several jobs."""

    tree: DictConfig
    overrides: list[str]
    recipe: NamedRecipe | None = None
    config_dir: Path | None = None  # the user's own options
    conf: Path = CONF  # with the user's

    @property
    def argv(self) -> list[str]:
        """What composes this job again, in another process or on another node."""
        flags = [f"--config-dir={self.config_dir}"] if self.config_dir else []
        return flags + self.overrides


def compose(argv: list[str], conf: Path = CONF) -> tuple[list[ComposedJob], list[str]]:
    """Return the jobs of a command line without its wrong overrides, and the problems of those.

    Hydra handles `--help` and `--cfg job`: it prints, and there is no job. Raises UserError if
    nothing composes.
    """
    argv, config_dir = user_conf.split_flag(argv)
    if config_dir:
        conf = user_conf.merged(config_dir, conf)
    arguments = get_args_parser().parse_intermixed_args(argv)  # flags may be between overrides
    accepted, problems = check_overrides(arguments.overrides, conf, arguments.multirun)
    if broken_files := file_problems(accepted, conf):
        raise UserError(*problems, *user_conf.with_own_paths(broken_files, conf))
    flags = [argument for argument in argv if argument not in arguments.overrides]
    jobs = _hydra(flags + accepted, conf, problems)
    if problems and not jobs:  # --cfg job with a wrong override
        raise UserError(*problems)
    return [job._replace(config_dir=config_dir, conf=conf) for job in jobs], problems


def check_overrides(
    overrides: list[str], conf: Path = CONF, multirun: bool = False
) -> tuple[list[str], list[str]]:
    """Return (the overrides for Hydra, a problem for each of the others)."""
    accepted = []
    problems = []
    parsed = []
    for text in overrides:
        if CONTROL.search(text):
            problems.append(f"{escaped(text)} has a control character; take it out")
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            problems.append(text_values.unreadable(text, str(error).strip().splitlines()[0]))
            continue
        parsed.append(override)
        if problem := _problem(override, conf) or text_values.override_problem(override):
            problems.append(problem)
        elif override.is_sweep_override() and not multirun:
            key, _, values = text.partition("=")
            problems.append(
                f"{text} reads as a sweep; type {text_values.quoted(key, values)} for one text, or"
                " add --multirun"
            )
        elif override.key_or_group.startswith(FREE) and override.type is OverrideType.CHANGE:
            accepted.append(f"++{text}")  # Hydra needs ++ for a new key of a free mapping
        else:
            accepted.append(text)
    return accepted, problems + _order_problem(parsed)


def file_problems(overrides: list[str], conf: Path = CONF) -> list[str]:
    """Return the YAML problems of config.yaml, the options in the overrides, and their defaults."""
    pending = [conf / "config.yaml"]
    checked = set()
    problems = []
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        group = override.key_or_group
        if (conf / group).is_dir() and group != SCENARIOS:
            names = _chosen_options(override) or options(group, conf)
            pending += [conf / group / f"{name}.yaml" for name in names]
    while pending:
        path = pending.pop()
        if path in checked or not path.is_file():  # Hydra reports a missing file
            continue
        checked.add(path)
        try:
            content = yaml_file.load_plain(path)
        except UserError as error:
            problems += error.problems
            continue
        for group, choice in _defaults(content):
            folder = conf / group[1:] if group.startswith("/") else path.parent / group
            names = choice if isinstance(choice, list) else [choice]
            pending += [folder / f"{name}.yaml" for name in names]
            if isinstance(choice, list):
                where = f"{path}: {group}: [{', '.join(map(str, choice))}]"
                problems.append(_list_problem(where, group.lstrip("/")))
        problems += text_values.file_problems(path, conf)
    return sorted(problems)


def _defaults(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield (group, choice) for `- model: NAME`, `- override /model: NAME` and `- NAME`."""
    entries = content.get("defaults") if isinstance(content, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        for group, choice in (entry if isinstance(entry, dict) else {"": entry}).items():
            yield str(group).split(" ")[-1].split("@")[0], choice


def _chosen_options(override: Override) -> list[str]:
    """Return the options that an override names; none for a glob pattern."""
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    if override.is_sweep_override():
        return [str(choice) for choice in override.sweep_iterator()]
    value = override.value()
    return [str(name) for name in (value if isinstance(value, list) else [value])]


def options(group: str, conf: Path = CONF) -> list[str]:
    """Return the options of a group: `options("router")` is the file names in conf/router."""
    return sorted(path.stem for path in (conf / group).glob("[!_]*.yaml"))


def _problem(override: Override, conf: Path) -> str | None:
    """Return the problem of one override, or None."""
    key = override.key_or_group
    added = override.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
    if not key:
        return f"{override.input_line} has no key; an override is key=value"
    if key == "hydra" or key.startswith("hydra.") or key.startswith("hydra/"):
        return _hydra_problem(override)
    if override.type is OverrideType.DEL:
        return f"{override.input_line}: a key cannot be removed; set it to null if null is allowed"
    if key == SCENARIOS:
        return (
            f"{override.input_line}: conf/bench belongs to the benchmark; type"
            " python tools/bench.py scenario=NAME"
        )
    if key in ADDED_GROUPS or (conf / key).is_dir():
        return _group_problem(override, added, conf)
    if key in legal_keys() or key.startswith(tuple(f"{free}." for free in FREE)):
        if override.type is OverrideType.ADD and key in legal_keys():
            return f"+{key}: the key exists already; type it without the plus"
        return None
    return unknown_key(key)


def _hydra_problem(override: Override) -> str | None:
    """Return the problem of a Hydra setting without its documented effect, or None."""
    key = override.key_or_group.replace("/", ".")
    if key in ("hydra.launcher", "hydra.sweeper") and override.value() == "basic":
        return None
    for name, advice in INEFFECTIVE.items():
        if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}."):
            return f"{override.input_line}: {advice}"
    return None


def _group_problem(override: Override, added: bool, conf: Path) -> str | None:
    group = override.key_or_group
    known = options(group, conf)
    if not known:
        return (
            f"{override.input_line}: the folder {conf / group} has no options; is the checkout"
            " complete?"
        )
    if group in ADDED_GROUPS and not added:
        return (
            f"{group}={override.value()}: {group} is not part of the default; type"
            f" +{group}={override.value()}"
        )
    if group not in ADDED_GROUPS and added:
        return (
            f"+{group}={override.value()}: {group} has a default; type {group}={override.value()}"
        )
    if not override.is_sweep_override() and isinstance(override.value(), list):
        return _list_problem(override.input_line, group)
    # a glob pattern is not checked: Hydra takes the matching options
    wrong = [name for name in _chosen_options(override) if name not in known]
    if not wrong:
        return None
    near = difflib.get_close_matches(str(wrong[0]), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={wrong[0]}: {hint}the options of {group} are {', '.join(known)}"


def _list_problem(where: str, group: str) -> str:
    """Return the problem of a list of options: Hydra would merge them key by key."""
    combined = "; for several auxiliary losses type router=combined" if group == "router" else ""
    return f"{where}: type one option of {group}; of several only the last would count{combined}"


def _order_problem(parsed: list[Override]) -> list[str]:
    """Return a problem if `+shrink` is before `+recipe`, which would override its sizes."""
    groups = [override.key_or_group for override in parsed]
    if "shrink" in groups and "recipe" in groups[groups.index("shrink") :]:
        return ["+shrink is before +recipe, whose sizes would win; type +recipe=... first"]
    return []


def _hydra(argv: list[str], conf: Path, known: list[str]) -> list[ComposedJob]:
    """Compose with Hydra; print Hydra's own errors to stderr, then raise UserError."""
    jobs: list[ComposedJob] = []
    refused: list[str] = []

    @hydra.main(version_base="1.3", config_path=str(conf), config_name="config")
    def collect(tree: DictConfig) -> None:
        if too_large := yaml_file.expansion_problem(tree):
            refused.append(too_large)
            return
        overrides = HydraConfig.get().overrides.task  # unresolved: their ${...} refer to the tree
        refused.extend(_resolve_hydra(tree))
        jobs.append(ComposedJob(tree, OmegaConf.to_container(overrides, resolve=False)))

    with scratch.folder() as folder:  # a sweep writes a multirun.yaml
        original_argv = sys.argv
        sys.argv = [sys.argv[0], *argv, f"hydra.sweep.dir='{folder}'"]
        stderr = io.StringIO()
        stdout = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
                collect()
        except SystemExit as stop:
            if stop.code:
                raise UserError(
                    *known, "Hydra could not compose this configuration: its reason is above"
                ) from None
        finally:
            sys.argv = original_argv
            if text := stdout.getvalue():  # --help, --cfg job
                print(text.replace(" _base,", ""), end="")
            print(_without_traceback(stderr.getvalue()), end="", file=sys.stderr)
    if refused:
        raise UserError(*known, *dict.fromkeys(refused))
    return [job._replace(recipe=_recipe(job.overrides, conf)) for job in jobs]


def _resolve_hydra(tree: DictConfig) -> list[str]:
    """Resolve every `${hydra:...}`, which has no value after Hydra returns; return the problems."""
    problems = []
    for key, raw in leaves(OmegaConf.to_container(tree, resolve=False)):
        names = HYDRA_RESOLVER.findall(str(raw))
        try:
            if any(HYDRA_OUTPUT.match(name) for name in names):
                problems.append(f"{key} = {raw} is not a permanent directory: {DIRECTORY}")
            elif any(OmegaConf.select(HydraConfig.get(), name) is None for name in names):
                problems.append(
                    f"{key} = {raw} has no value here; ${{hydra:job.num}} is the number of a job"
                    " of --multirun"
                )
            elif names:
                value = OmegaConf.select(tree, key)
                if OmegaConf.is_config(value):
                    value = OmegaConf.to_container(value, resolve=True)
                OmegaConf.update(tree, key, value, merge=False)
        except OmegaConfBaseException as error:
            problems.append(f"{key} = {raw} cannot be resolved: {str(error).splitlines()[0]}")
    return problems


def _without_traceback(stderr: str) -> str:
    """Return Hydra's error output without the traceback."""
    lines = [
        line for line in stderr.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line
    ]
    if any(line.startswith(("Traceback", "Error executing job", "  File")) for line in lines):
        lines = lines[-1:]
    return "".join(f"{escaped(line)}\n" for line in lines)


def _recipe(overrides: list[str], conf: Path) -> NamedRecipe | None:
    """Compose the recipe of a job without its other overrides; None if the job has no recipe."""
    groups = [text for text in overrides if text.split("=")[0].lstrip("+") in ADDED_GROUPS]
    names = [text.split("=", 1)[1] for text in groups if text.startswith("+recipe=")]
    if not names:
        return None
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        return NamedRecipe(names[0], hydra.compose("config", overrides=groups))
