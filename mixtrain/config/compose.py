"""From the words of a command line to composed configurations, with every wrong word found. No torch.

Rule: Hydra stops at the first unknown override, with exit code 1 and no hint, and silently takes `+recipe=x` for a
plain key when no such group is found. So the overrides are held against the tree of groups and keys first.
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
from mixtrain.config import text_values
from mixtrain.config.schema import FREE, leaves, legal_keys, unknown_key
from mixtrain.errors import UserError
from mixtrain.system import scratch, yaml_file

CONF = Path(__file__).resolve().parents[2] / "conf"
ADDED_GROUPS = ("recipe", "shrink")  # not in config.yaml's defaults list: given with a plus
SCENARIOS = "bench"  # a folder in conf/ that is no group
OF_HYDRA = re.compile(r"\$\{\s*hydra\s*:\s*([\w.]*)")  # has a value only while Hydra runs
# where Hydra would write, which does not write here: a folder that goes when all is composed, or
# the current one
OUTPUT = re.compile(r"(run|sweep)\b|runtime\.output_dir$")
DIRECTORY = (
    "Hydra only composes here; a run writes to run_dir, a sweep's to"
    " run_dir='runs/${name}-${hydra:job.num}'"
)
ONE_BY_ONE = (
    "the jobs of a sweep run one after the other; tools/submit.py --multirun sends them"
    " to Slurm all at once"
)
INSTEAD = {  # settings of Hydra that would be taken and not do what they say
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
    if broken := file_problems(kept, conf):
        raise UserError(*problems, *broken)
    words = [word for word in argv if word not in arguments.overrides] + kept
    jobs = _hydra(words, conf, problems)
    if problems and not jobs:  # --cfg job with a wrong override
        raise UserError(*problems)
    return jobs, problems


def check_overrides(
    overrides: list[str], conf: Path = CONF, multirun: bool = False
) -> tuple[list[str], list[str]]:
    """(the overrides that Hydra can take, one problem for each of the others)."""
    kept = []
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
        if problem := _problem(override, conf) or text_values.word_problem(override):
            problems.append(problem)
        elif override.is_sweep_override() and not multirun:
            key, _, values = text.partition("=")
            problems.append(
                f"{text} reads as a sweep; type {text_values.quoted(key, values)} for one text, or"
                " add --multirun"
            )
        elif override.key_or_group.startswith(FREE) and override.type is OverrideType.CHANGE:
            kept.append(f"++{text}")  # a free mapping: Hydra wants to be told that the key is new
        else:
            kept.append(text)
    return kept, problems + _order(parsed)


def file_problems(overrides: list[str], conf: Path = CONF) -> list[str]:
    """What is wrong, as YAML, with the files that the overrides compose: config.yaml, and what it and others name."""
    waiting = [conf / "config.yaml"]
    seen = set()
    problems = []
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        group = override.key_or_group
        if (conf / group).is_dir() and group != SCENARIOS:
            waiting += [
                conf / group / f"{name}.yaml" for name in _chosen(override) or options(group, conf)
            ]
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():  # a name that there is not: Hydra says so
            continue
        seen.add(path)
        try:
            found = yaml_file.load_plain(path)
        except UserError as error:
            problems += error.problems
        else:
            for group, names in _defaults(found):
                base = conf / group[1:] if group.startswith("/") else path.parent / group
                waiting += [
                    base / f"{name}.yaml"
                    for name in (names if isinstance(names, list) else [names])
                ]
                if isinstance(names, list):
                    problems.append(
                        _several(
                            f"{path}: {group}: [{', '.join(map(str, names))}]", group.lstrip("/")
                        )
                    )
            problems += text_values.file_problems(path, conf)
    return sorted(problems)


def _defaults(found: Any) -> Iterator[tuple[str, Any]]:
    """(group, what is chosen) of a file's defaults list: `- model: NAME`, `- override /model: NAME`, `- NAME`."""
    entries = found.get("defaults") if isinstance(found, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        for group, names in (entry if isinstance(entry, dict) else {"": entry}).items():
            yield str(group).split(" ")[-1].split("@")[0], names


def _chosen(override: Override) -> list[str]:
    """The options that an override names; none where it is a pattern."""
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    if override.is_sweep_override():
        return [str(choice) for choice in override.sweep_iterator()]
    value = override.value()
    return [str(name) for name in (value if isinstance(value, list) else [value])]


def options(group: str, conf: Path = CONF) -> list[str]:
    """The options of a group: `options("router")` is the file names in conf/router."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def _problem(override: Override, conf: Path) -> str | None:
    """What is wrong with one override, or None."""
    key = override.key_or_group
    added = override.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
    if not key:
        return f"{override.input_line} has no key; an override is key=value"
    if key == "hydra" or key.startswith("hydra.") or key.startswith("hydra/"):
        return _hydra_problem(override)
    if override.type is OverrideType.DEL:
        return (
            f"{override.input_line}: no key can be taken away; set it to null where null is allowed"
        )
    if key == SCENARIOS:
        return (
            f"{override.input_line}: conf/bench is the benchmark's; type python tools/bench.py"
            " scenario=NAME"
        )
    if key in ADDED_GROUPS or (conf / key).is_dir():
        return _group_problem(override, added, conf)
    if key in legal_keys() or key.startswith(tuple(f"{free}." for free in FREE)):
        plain_add = override.type is OverrideType.ADD and key in legal_keys()
        return f"+{key}: the key is there already; type it without the plus" if plain_add else None
    return unknown_key(key)


def _hydra_problem(override: Override) -> str | None:
    """A word that Hydra would take and that would do nothing, or another thing."""
    key = override.key_or_group.replace("/", ".")
    if key in ("hydra.launcher", "hydra.sweeper") and override.value() == "basic":
        return None
    within = [
        name for name in INSTEAD if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.")
    ]
    return f"{override.input_line}: {INSTEAD[within[0]]}" if within else None


def _group_problem(override: Override, added: bool, conf: Path) -> str | None:
    group = override.key_or_group
    known = options(override.key_or_group, conf)
    if not known:
        return (
            f"{override.input_line}: there is no folder of options {conf / group}; is the"
            " checkout complete?"
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
        return _several(override.input_line, group)
    # of a pattern Hydra takes those that fit it
    wrong = [name for name in _chosen(override) if name not in known]
    if not wrong:
        return None
    near = difflib.get_close_matches(str(wrong[0]), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={wrong[0]}: {hint}the options of {group} are {', '.join(known)}"


def _several(where: str, group: str) -> str:
    """The problem of a list in the place of an option: Hydra composes one after the other, key by key."""
    combined = "; several auxiliary losses are router=combined" * (group == "router")
    return (
        f"{where}: one option of {group} at a time, of several the last alone would count{combined}"
    )


def _order(parsed: list[Override]) -> list[str]:
    """`+shrink` before `+recipe` would have its sizes overwritten by the recipe."""
    groups = [override.key_or_group for override in parsed]
    if "shrink" in groups and "recipe" in groups[groups.index("shrink") :]:
        return ["+shrink stands before +recipe, whose sizes would win; type +recipe=... first"]
    return []


def _hydra(words: list[str], conf: Path, known: list[str]) -> list[Composed]:
    """Let Hydra itself compose. Its own errors go to stderr as it words them, then end in a UserError."""
    jobs: list[Composed] = []
    refused: list[str] = []

    @hydra.main(version_base="1.3", config_path=str(conf), config_name="config")
    def collect(tree: DictConfig) -> None:
        if too_large := yaml_file.expansion_problem(tree):
            refused.append(too_large)
            return
        overrides = HydraConfig.get().overrides.task  # unresolved: the ${...} in them is the tree's
        refused.extend(_resolve_hydra(tree))
        # its recipe: below
        jobs.append(Composed(tree, OmegaConf.to_container(overrides, resolve=False)))

    with scratch.folder() as folder:  # a sweep leaves a multirun.yaml somewhere
        before = sys.argv
        sys.argv = [sys.argv[0], *words, f"hydra.sweep.dir='{folder}'"]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                collect()
        except SystemExit as stop:
            if stop.code:
                raise UserError(
                    *known, "Hydra could not compose this configuration: its reason is above"
                ) from None
        finally:
            sys.argv = before
            print(_without_traceback(said.getvalue()), end="", file=sys.stderr)
    if refused:
        raise UserError(*known, *dict.fromkeys(refused))
    return [job._replace(recipe=_recipe(job.overrides, conf)) for job in jobs]


def _resolve_hydra(tree: DictConfig) -> list[str]:
    """Give every `${hydra:...}` its value, which has none once Hydra is through; what is wrong with some."""
    problems = []
    for key, raw in leaves(OmegaConf.to_container(tree, resolve=False)):
        names = OF_HYDRA.findall(str(raw))
        try:
            if any(OUTPUT.match(name) for name in names):
                problems.append(f"{key} = {raw} is no place to keep anything: {DIRECTORY}")
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


def _without_traceback(said: str) -> str:
    """What Hydra says on stderr, but for where in its code it was."""
    lines = [line for line in said.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    if any(line.startswith(("Traceback", "Error executing job", "  File")) for line in lines):
        lines = lines[-1:]
    return "".join(f"{escaped(line)}\n" for line in lines)


def _recipe(overrides: list[str], conf: Path) -> NamedRecipe | None:
    """The recipe among a job's overrides, composed without the others; None where the job names none."""
    groups = [text for text in overrides if text.split("=")[0].lstrip("+") in ADDED_GROUPS]
    names = [text.split("=", 1)[1] for text in groups if text.startswith("+recipe=")]
    if not names:
        return None
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        return NamedRecipe(names[0], hydra.compose("config", overrides=groups))
