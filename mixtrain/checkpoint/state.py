"""What a run must know to go on, beside its tensors: run_state.json of a checkpoint. No torch.

Rule: whatever decides the next step is here or in a tensor, and nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import Check, Count, Name

NAME = "run_state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run is. The beginning of a new one is RunState()."""

    step: int = 0
    consumed_samples: int = 0
    schedule_steps: int = 0  # of the learning rate: a skipped step is not one
    optimizer_steps: int = 0  # that Adam has counted
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    # the run was asked to stop before the validation that belongs to this step
    validation_due: bool = False
    # fingerprints of the training data and of their order
    data: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # resolved
    layout: dict[str, int] = field(default_factory=dict)  # how the ranks were arranged
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that wrote it
    # HfSource of the model of Hugging Face that it began as
    hf_source: dict[str, Any] | None = None


# resolved when it was written: ${oc.env:SECRET} would now read what belongs to whoever looks at the
# checkpoint
RESOLVED = Check("a resolved configuration, without ${", lambda config: "${" not in str(config))


class HfSource(TypedDict):
    """What a converted model came with that is not the architecture's, and goes out again with an export."""

    config: dict[str, Any]  # of config.json
    generation_config: NotRequired[dict[str, Any]]  # generation_config.json, if there was one
    # SHA-256 of its vocabulary files: the ids in `config` are of that one; "" if it had none
    tokenizer: Name
    vocab_size: Count  # without the rows that were added to be divisible


class Written(TypedDict):
    """run_state.json. What later versions have added need not be there."""

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
    """The state in a checkpoint. ValueError with what is wrong, naming the file."""
    missing = "no run of mixtrain has written this checkpoint"
    values = untrusted_json.read(directory / NAME, Written, missing=missing)
    return RunState(
        **{entry.name: values[entry.name] for entry in fields(RunState) if entry.name in values}
    )
