"""Compare a checkpoint's model settings that shapes do not show, from run_state.json. No torch.

Rule: a difference is refused with both values unless checkpoint.acknowledge_differences names its
key.
"""

from __future__ import annotations

from pathlib import Path

from mixtrain.checkpoint import state
from mixtrain.config.model_differences import differences
from mixtrain.config.schema import Config
from mixtrain.errors import UserError


def refuse_differences(config: Config, checkpoint: Path) -> None:
    """Raise UserError with every unacknowledged difference, or if run_state.json cannot be read."""
    try:
        messages = problems(config, checkpoint)
    except ValueError as error:
        raise UserError(f"{error}; what shapes do not show cannot be compared") from None
    if messages:
        raise UserError(*messages)


def problems(config: Config, checkpoint: Path) -> list[str]:
    """Return a line for each unacknowledged difference. ValueError without run_state.json."""
    acknowledged = config.checkpoint.acknowledge_differences
    return [
        difference.message(checkpoint)
        for difference in differences(config, state.read(checkpoint).config)
        if difference.key not in acknowledged
    ]
