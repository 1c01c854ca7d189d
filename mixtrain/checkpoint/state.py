"""What a run must know to go on, beside its tensors: run_state.json of a checkpoint. No torch.

Rule: whatever decides the next step is here or in a tensor, and nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

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
    validation_due: bool = False  # the run was asked to stop before the validation that belongs to this step
    data: dict[str, str] = field(default_factory=dict)  # fingerprints of the training data and of their order
    config: dict[str, Any] = field(default_factory=dict)  # resolved
    layout: dict[str, int] = field(default_factory=dict)  # how the ranks were arranged
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that wrote it


def to_json(state: RunState) -> str:
    return json.dumps(asdict(state), indent=1) + "\n"


def read(directory: Path) -> RunState:
    """The state in a checkpoint. ValueError with what is wrong, naming the file."""
    path = directory / NAME
    try:
        values = json.loads(path.read_bytes())
        known = {entry.name for entry in fields(RunState)}
        state = RunState(**{name: value for name, value in values.items() if name in known})
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: no run of mixtrain has written this checkpoint") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: it is not the state of a run") from None
    return state
