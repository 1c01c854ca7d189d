"""A benchmark's scenario: conf/bench/NAME.yaml with the words of a command line laid over it. No torch.

Rule: YAML holds every value, these classes names and types. What a scenario trains is said in words of train.py.
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

# forward_backward: of one global batch, without an optimizer; step: the same with the optimizer's;
# save: of a checkpoint, or of as many bytes in plain files; command: a line of a shell
Measure = Enum("Measure", ["forward_backward", "step", "save", "command"])


@dataclass
class Row:
    """Variants that are compared with each other. The ratio is the first one's speed over another's."""

    measure: Measure = MISSING
    # of what is trained: words of train.py for all, and for each; hf.KEY=VALUE is transformers' own
    # model with that setting, host.memory_settings=false leaves out those of system/host_memory.py.
    # Of a command: the line of each
    words: list[str] = field(default_factory=list)
    variants: dict[str, list[str]] = MISSING
    prepare: str | None = None  # commands only: a line that is run once, before all
    # commands only: time stops at the first line of output that matches; null: at the end
    until: str | None = None


@dataclass
class Scenario:
    rounds: int = MISSING  # a round is one turn of each variant: A B C D A B C D
    repeats: int = MISSING  # measured one after the other in a turn
    warmup: int = MISSING  # repeats that do not count, whenever a process has started
    # processes live as long as their row; false: as long as their turn (GPU memory)
    resident: bool = MISSING
    # CPU threads of a variant, divided among its ranks; null: PyTorch's own choice
    threads: int | None = MISSING
    # before a round: how long to wait for others to leave the machine alone
    patience_seconds: float = MISSING
    words: list[str] = field(default_factory=list)
    rows: dict[str, Row] = MISSING


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    name: str
    scenario: Scenario
    words: list[str]  # of train.py, over those of the scenario
    # the benchmark's own, but for where things are written
    changes: list[str] = field(default_factory=list)
    csv: str | None = None  # where the readings go
    folder: str | None = None  # where variants write: the disk that is measured


def parse(argv: list[str]) -> Request:
    """The request of `scenario=NAME [keys of OWN] [words of train.py]`."""
    own, words = _own_words(argv)
    name = own.pop("scenario", None)
    if name not in names():
        near = get_close_matches(str(name), names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"scenario={'' if name is None else name}: {hint}there are {', '.join(names())}"
        )
    only_rows, only_variants, csv, folder = (
        own.pop(key, None) for key in ("rows", "variants", "csv", "folder")
    )
    scenario = load(FOLDER / f"{name}.yaml", own)
    changes = [word for word in argv if word.partition("=")[0] in ("rows", "variants", *CHANGEABLE)]
    return Request(name, chosen(scenario, only_rows, only_variants), words, changes, csv, folder)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


# of a Scenario
CHANGEABLE = ("rounds", "repeats", "warmup", "resident", "threads", "patience_seconds")
OWN = ("scenario", "rows", "variants", "csv", "folder", *CHANGEABLE)


def _own_words(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """(the benchmark's own keys, the words for train.py)."""
    own = {}
    words = []
    for word in argv:
        key, equals, value = word.partition("=")
        if key in OWN and equals:
            own[key] = value
        elif word.startswith("-") or not equals:
            raise UserError(
                f"{word} is no key=value; the benchmark's keys are {', '.join(OWN)}, the others"
                " train.py's"
            )
        else:
            words.append(word)
    return own, words


def load(path: Path, changes: dict[str, str]) -> Scenario:
    """The scenario of a file, with some values changed; UserError for what does not belong or fit."""
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Scenario), yaml_file.read(path))
        tree = OmegaConf.merge(
            tree, OmegaConf.from_dotlist([f"{key}={value}" for key, value in changes.items()])
        )
        scenario = OmegaConf.to_object(tree)
    except (OmegaConfBaseException, yaml.YAMLError) as error:  # of a value that was typed
        raise UserError(f"{path.name}: {str(error).splitlines()[0]}") from None
    minimum = {"rounds": 1, "repeats": 1, "warmup": 0, "threads": 1, "patience_seconds": 0}
    wrong = [
        f"{key} = {getattr(scenario, key)} must be at least {least}"
        for key, least in minimum.items()
        if (getattr(scenario, key) if getattr(scenario, key) is not None else least) < least
    ]
    if wrong:
        raise UserError(*wrong)
    return scenario


def chosen(scenario: Scenario, rows: str | None, variants: str | None) -> Scenario:
    """The scenario with only these rows and variants: names as in [a,b]."""
    kept = _only("rows", rows, scenario.rows)
    if variants is not None:
        every = {name: None for row in kept.values() for name in row.variants}
        wanted = _only("variants", variants, every)
        kept = {
            name: replace(
                row, variants={own: words for own, words in row.variants.items() if own in wanted}
            )
            for name, row in kept.items()
        }
    return replace(scenario, rows={name: row for name, row in kept.items() if row.variants})


def _only(what: str, wanted: str | None, there: dict) -> dict:
    if wanted is None:
        return there
    listed = [name.strip() for name in wanted.strip("[]").split(",") if name.strip()]
    if unknown := [name for name in listed if name not in there]:
        raise UserError(f"{what}={unknown[0]}: there are {', '.join(there)}")
    return {name: value for name, value in there.items() if name in listed}
