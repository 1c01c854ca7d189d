"""A plain Megatron-Core distributed checkpoint of the weights, in Megatron-LM's directories."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from mixtrain.optimizer import Training, gather_parameters
from mixtrain.places import unwrap
from mixtrain.plan import Plan
from mixtrain.ranks import Ranks

TRACKER = "latest_checkpointed_iteration.txt"


def save(plan: Plan, ranks: Ranks, training: Training, step: int) -> Path:
    """Write the weights after `step` steps to run_dir/iter_NNNNNNN; every rank must call.

    Names are those of the unwrapped model, layers stacked, whatever the layout: it loads at any other.
    """
    directory = Path(plan.config.run_dir) / f"iter_{step:07d}"
    if ranks.is_first:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    gather_parameters(plan, training)
    dist_checkpointing.save(weights(training), str(directory))
    if ranks.is_first:
        (directory.parent / TRACKER).write_text(f"{step}\n")
    return directory


def weights(training: Training) -> dict:
    """The sharded state dict of this rank's model chunks: `model`, or `model0`, `model1` ... with virtual stages."""
    states = [unwrap(chunk).sharded_state_dict() for chunk in training.chunks]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}
