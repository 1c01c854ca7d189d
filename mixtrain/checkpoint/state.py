"""run_state.json of a checkpoint: what a run needs to resume, beside its tensors. No torch.

Rule: everything that determines the next step is stored here or in a tensor, nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from mixtrain.errors import UserError
from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import Check, Count, Name

NAME = "run_state.json"


@dataclass(frozen=True)
class RunState:
    """The progress of a run. A new run starts with RunState()."""

    step: int = 0
    consumed_samples: int = 0
    schedule_steps: int = 0  # of the learning-rate schedule: skipped steps do not count
    optimizer_steps: int = 0  # Adam's step count
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    # the run was asked to stop before the validation that is due at this step
    validation_due: bool = False
    # fingerprints of the training data and of their order
    data: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # resolved
    layout: dict[str, int] = field(default_factory=dict)  # parallel sizes: load.layout
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that wrote it
    # an HfSource, if the run started from a Hugging Face model
    hf_source: dict[str, Any] | None = None


# Resolved when written: ${oc.env:SECRET} would otherwise read the environment of whoever opens the
# checkpoint.
RESOLVED = Check("a resolved configuration, without ${", lambda config: "${" not in str(config))


class HfSource(TypedDict):
    """What a Hugging Face model has beside its architecture; an export writes it again."""

    config: dict[str, Any]  # of config.json
    generation_config: NotRequired[dict[str, Any]]  # generation_config.json, if there was one
    # SHA-256 of its vocabulary files, to which the ids in `config` belong; "" if it had none
    tokenizer: Name
    vocab_size: Count  # without the rows added for divisibility


class RunStateFile(TypedDict):
    """run_state.json. Keys that later versions added are optional."""

    step: Count
    consumed_samples: Count
    schedule_steps: Count
    optimizer_steps: Count
    skipped_steps: NotRequired[Count]
    skipped_in_a_row: NotRequired[Count]
    validation_due: NotRequired[bool]
    data: NotRequired[dict[Name, Name]]
    config: NotRequired[Annotated[dict[str, Any], RESOLVED]]
    layout: NotRequired[dict[Name, int]]
    versions: NotRequired[dict[Name, Name]]
    hf_source: NotRequired[HfSource | None]


def to_json(state: RunState) -> str:
    return json.dumps(asdict(state), indent=1) + "\n"


def read(directory: Path) -> RunState:
    """Read the state of a checkpoint. ValueError with the file and what is wrong with it."""
    missing = "no run of mixtrain has written this checkpoint"
    values = untrusted_json.read(directory / NAME, RunStateFile, missing=missing)
    return RunState(
        **{entry.name: values[entry.name] for entry in fields(RunState) if entry.name in values}
    )


def state_of(checkpoint: Path) -> RunState:
    """Read the state of the checkpoint that a user means. UserError as read's ValueError."""
    try:
        return read(checkpoint)
    except ValueError as error:
        raise UserError(str(error)) from None
