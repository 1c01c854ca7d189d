"""What a checkpoint holds, in Megatron-LM's names: tensors by place, objects by rank, and what all ranks share.

Rule: keys and shapes are those that Megatron-LM with Transformer Engine writes with
--dist-ckpt-optim-fully-reshardable, so that its loader takes a checkpoint of ours, at any layout.
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mixtrain.checkpoint import optimizer_state
from mixtrain.checkpoint.megatron_args import megatron_args
from mixtrain.checkpoint.state import RunState
from mixtrain.config import plain
from mixtrain.optimizer import Training
from mixtrain.places import unwrap
from mixtrain.plan import Plan

FORMAT = {  # Megatron-LM asks of a checkpoint how its optimizer was sharded
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
CHECKPOINT_VERSION = 3.0  # Megatron-LM's: query, key and value interleaved by group


def sharded(plan: Plan, training: Training) -> dict[str, Any]:
    """All that lies in shards: the model's tensors, the optimizer's, the random streams. Views, not copies."""
    kind = plain(plan.config.optimizer.optimizer)
    optimizer_state.fill(training, kind)
    return {**model(training), "optimizer_state": optimizer_state.sharded(training, kind), "rng_state": rng_state()}


def model(training: Training) -> dict[str, Any]:
    """The sharded state dict of this rank's model chunks: `model`, or `model0`, `model1` ... with virtual stages."""
    states = [unwrap(chunk).sharded_state_dict() for chunk in training.chunks]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}


def common(plan: Plan, training: Training, state: RunState) -> dict[str, Any]:
    """What is the same on every rank: common.pt, as Megatron-LM's loader reads it."""
    return {
        "args": megatron_args(plan, state),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": state.step,
        "optimizer": _optimizer_groups(training, state.optimizer_steps),
        "opt_param_scheduler": training.scheduler.state_dict(),
        "num_floating_point_operations_so_far": 0,
        "content_metadata": FORMAT,
    }


def _optimizer_groups(training: Training, steps: int) -> dict:
    """The settings of the parameter groups, for Megatron-LM: a run of mixtrain has them from its configuration."""
    found = []
    for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        groups = [
            {name: value for name, value in group.items() if name != "params"} | {"step": steps}
            for group in optimizer.optimizer.param_groups
        ]
        entry = {"optimizer": {"param_groups": groups}}
        if isinstance(optimizer, DistributedOptimizer):
            entry["param_state_sharding_type"] = FORMAT["distrib_optim_sharding_type"]
        found.append(entry)
    return found[0] if len(found) == 1 else dict(enumerate(found))


def rng_state() -> ShardedObject:
    """This rank's random streams, in the object that Megatron-LM makes of them."""
    streams = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return rng_object([streams])


def rng_object(data: list | None) -> ShardedObject:
    """Its place: by pipeline and tensor rank, and with expert parallelism by data-parallel rank too, as upstream."""
    pipeline = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    tensor = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    axes = [pipeline, tensor]
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        axes, copy = [*axes, (copy, copies)], 0
    return ShardedObject(
        "rng_state", data, tuple(size for _, size in axes), tuple(rank for rank, _ in axes), replica_id=copy
    )


def set_rng_state(streams: dict[str, Any]) -> None:
    """Go on with the random streams of `rng_state`."""
    random.setstate(streams["random_rng_state"])
    numpy.random.set_state(streams["np_rng_state"])
    torch.set_rng_state(streams["torch_rng_state"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(streams["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(streams["rng_tracker_states"])
