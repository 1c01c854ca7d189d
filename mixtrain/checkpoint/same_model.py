"""Whether weights are for this model where shapes do not tell: what their run_state.json says, key by key. No torch.

Rule: a difference is refused with both values unless checkpoint.acknowledge_differences names its key.
"""

from __future__ import annotations

from pathlib import Path

from mixtrain.checkpoint import state
from mixtrain.config.model_differences import differences
from mixtrain.config.schema import Config
from mixtrain.errors import UserError


def refuse(config: Config, checkpoint: Path) -> None:
    """UserError with every difference that is not acknowledged, or if the checkpoint does not say what it is of."""
    try:
        found = problems(config, checkpoint)
    except ValueError as error:
        raise UserError(f"{error}; what shapes do not show cannot be compared") from None
    if found:
        raise UserError(*found)


def problems(config: Config, checkpoint: Path) -> list[str]:
    """A line for each difference that is not acknowledged. ValueError if there is no run_state.json to read."""
    known = config.checkpoint.acknowledge_differences
    there = state.read(checkpoint).config
    return [
        found.message(checkpoint) for found in differences(config, there) if found.key not in known
    ]
