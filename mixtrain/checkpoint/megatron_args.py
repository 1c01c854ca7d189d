"""A run's settings as Megatron-LM's command line would have them: the `args` that its loader asks a checkpoint for.

Rule: plain values in an argparse.Namespace, which is all that a restricted reader takes.
"""

from __future__ import annotations

from argparse import Namespace

from mixtrain.checkpoint.state import RunState
from mixtrain.plan import Plan


def megatron_args(plan: Plan, state: RunState) -> Namespace:
    """What --use-checkpoint-args reads, and where the run is."""
    model, parallel, trainer = plan.config.model, plan.config.parallel, plan.config.trainer
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        iteration=state.step,
        consumed_train_samples=state.consumed_samples,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        world_size=plan.world_size,
        micro_batch_size=trainer.micro_batch_size,
    )
