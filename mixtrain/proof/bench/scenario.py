"""Benchmark scenarios: conf/bench/NAME.yaml with the overrides of a command line. No torch.

Rule: the YAML has every value, these classes have names and types. What a scenario trains is given
by overrides of train.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import Enum
from pathlib import Path

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixtrain.config.compose import CONF
from mixtrain.errors import UserError
from mixtrain.system import yaml_file

FOLDER = CONF / "bench"
# keys of a Scenario that the command line may change, with the least value of a number
MINIMUM = {"rounds": 1, "repeats": 1, "warmup": 0, "threads": 1, "patience_seconds": 0}
CHANGEABLE = (*MINIMUM, "resident")
OWN_KEYS = ("scenario", "rows", "variants", "csv", "folder", *CHANGEABLE)

# forward_backward: one global batch, without an optimizer; step: the same with an optimizer step;
# save: a checkpoint, or as many bytes in plain files; command: a shell command
Measure = Enum("Measure", ["forward_backward", "step", "save", "command"])


@dataclass
class ScenarioRow:
    """Variants that are compared with each other. A ratio is the first one's speed / another's."""

    measure: Measure = MISSING
    # Overrides of train.py, for all variants and for each. hf.KEY=VALUE: transformers' own model
    # with that setting; host.memory_settings=false: without the settings of system/host_memory.py.
    # If `measure` is command, each variant is a shell command.
    words: list[str] = field(default_factory=list)
    variants: dict[str, list[str]] = MISSING
    prepare: str | None = None  # commands only: a command that runs once, before all others
    # commands only: time stops at the first output line that matches; null: at the end
    until: str | None = None


@dataclass
class Scenario:
    rounds: int = MISSING  # a round is one turn of each variant: A B C D A B C D
    repeats: int = MISSING  # measured in a turn, one after the other
    warmup: int = MISSING  # repeats that are not measured, at the start of each process
    # processes live as long as their row; false: as long as their turn (saves GPU memory)
    resident: bool = MISSING
    # CPU threads of a variant, divided among its ranks; null: PyTorch's default
    threads: int | None = MISSING
    # how long to wait before a round for other processes to leave the machine idle
    patience_seconds: float = MISSING
    words: list[str] = field(default_factory=list)
    rows: dict[str, ScenarioRow] = MISSING


@dataclass(frozen=True)
class BenchRequest:
    """A parsed command line of tools/bench.py."""

    name: str
    scenario: Scenario
    overrides: list[str]  # of train.py, applied after those of the scenario
    # the given arguments rows, variants and CHANGEABLE
    changes: list[str] = field(default_factory=list)
    csv: str | None = None  # file for the readings
    folder: str | None = None  # where variants write: the disk that is measured


def parse(argv: list[str]) -> BenchRequest:
    """Parse `scenario=NAME [keys of OWN_KEYS] [overrides of train.py]`."""
    own: dict[str, str] = {}
    overrides = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            raise UserError(
                f"{argument} is not key=value; the benchmark's keys are {', '.join(OWN_KEYS)}, all"
                " other keys are train.py's"
            )
        if key in OWN_KEYS:
            own[key] = value
        else:
            overrides.append(argument)
    name = own.get("scenario", "")
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"scenario={name}: {hint}there are {', '.join(names())}")
    scenario = load(FOLDER / f"{name}.yaml", {key: own[key] for key in CHANGEABLE if key in own})
    scenario = select(scenario, own.get("rows"), own.get("variants"))
    keys = ("rows", "variants", *CHANGEABLE)
    changes = [argument for argument in argv if argument.partition("=")[0] in keys]
    return BenchRequest(name, scenario, overrides, changes, own.get("csv"), own.get("folder"))


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(path: Path, changes: dict[str, str]) -> Scenario:
    """Load the scenario of a file with some values changed. UserError for wrong keys or values."""
    dotlist = [f"{key}={value}" for key, value in changes.items()]
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Scenario), yaml_file.read(path))
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(dotlist))
        scenario = OmegaConf.to_object(tree)
    except (OmegaConfBaseException, yaml.YAMLError) as error:  # from a value on the command line
        raise UserError(f"{path.name}: {str(error).splitlines()[0]}") from None
    values = {key: getattr(scenario, key) for key in MINIMUM}
    problems = [
        f"{key} = {value} must be at least {MINIMUM[key]}"
        for key, value in values.items()
        if value is not None and value < MINIMUM[key]
    ]
    if problems:
        raise UserError(*problems)
    return scenario


def select(scenario: Scenario, rows: str | None, variants: str | None) -> Scenario:
    """Return the scenario with only these rows and variants; each is a list such as [a,b]."""
    row_names = _listed("rows", rows, scenario.rows)
    selected = {name: row for name, row in scenario.rows.items() if name in row_names}
    every_name = {name: None for row in selected.values() for name in row.variants}
    variant_names = _listed("variants", variants, every_name)
    for name, row in selected.items():
        kept = {key: words for key, words in row.variants.items() if key in variant_names}
        selected[name] = replace(row, variants=kept)
    return replace(scenario, rows={name: row for name, row in selected.items() if row.variants})


def _listed(key: str, names: str | None, available: dict[str, object]) -> list[str]:
    if names is None:
        return list(available)
    listed = [name.strip() for name in names.strip("[]").split(",") if name.strip()]
    if unknown := [name for name in listed if name not in available]:
        raise UserError(f"{key}={unknown[0]}: there are {', '.join(available)}")
    return listed
