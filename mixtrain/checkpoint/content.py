"""The contents of a checkpoint: sharded tensors, objects of each rank, and shared state.

Rule: keys and shapes are those that Megatron-LM with Transformer Engine writes with
--dist-ckpt-optim-fully-reshardable, so its loader reads a checkpoint of mixtrain at any layout.
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)

from mixtrain.checkpoint import optimizer_state
from mixtrain.checkpoint.megatron_args import CHECKPOINT_VERSION, FORMAT, megatron_args
from mixtrain.checkpoint.state import RunState
from mixtrain.config import tensor_schema
from mixtrain.config.plan import Plan
from mixtrain.config.typed_config import plain
from mixtrain.engine.optimizer import Training
from mixtrain.engine.shards import unwrap


def sharded(plan: Plan, training: Training) -> dict[str, Any]:
    """Return all sharded state, as views: model and optimizer tensors, random streams."""
    kind = plain(plan.config.optimizer.optimizer)
    optimizer_state.initialize(training, kind)
    return {
        **model(training.chunks),
        "extra_states": extra_states(training),
        "optimizer_state": optimizer_state.sharded(training, kind),
        "rng_state": rng_state(),
    }


def model(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded state dicts of this rank's model chunks.

    The key is `model`, or with virtual pipeline stages `model0`, `model1` ...
    """
    states = [unwrap(chunk).sharded_state_dict() for chunk in chunks]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}


def extra_states(training: Training) -> list[ShardedObject]:
    """Return an empty object for each _extra_state that this model's modules do not write.

    Transformer Engine's modules write them, and Megatron-LM refuses a checkpoint that lacks one.
    """
    tree = model(training.chunks)
    apply_factories(tree)
    leaves = list(nested_values(tree))
    present = {leaf.unique_key for leaf in leaves if isinstance(leaf, ShardedObject)}
    missing = {}
    for leaf in leaves:
        key = tensor_schema.extra_state(leaf.key)
        axes = leaf.prepend_axis_num if isinstance(leaf, ShardedTensor) else None
        if key is None or axes is None:
            continue
        # the rank with the first element of the weight writes the object
        if any(leaf.global_offset[axes:]) or not is_main_replica(leaf.replica_id):
            continue
        extra_state = ShardedObject(
            key, None, leaf.global_shape[:axes] or (1,), leaf.global_offset[:axes] or (0,)
        )
        if extra_state.unique_key not in present:
            missing[extra_state.unique_key] = extra_state
    return list(missing.values())


def common(plan: Plan, training: Training, state: RunState) -> dict[str, Any]:
    """Return common.pt, the state shared by all ranks, as Megatron-LM's loader reads it."""
    return {
        "args": megatron_args(plan, state),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": state.step,
        "optimizer": _optimizer_groups(training, state.optimizer_steps),
        "opt_param_scheduler": _schedule(plan, training),
        "num_floating_point_operations_so_far": 0,
        "content_metadata": FORMAT,
    }


def _optimizer_groups(training: Training, steps: int) -> dict:
    """Return the parameter groups, for Megatron-LM; mixtrain takes them from the configuration."""
    # Apex's and Transformer Engine's Adam load a group unchanged, and need keys that PyTorch's
    # Adam does not have.
    fused_adam_keys = {"bias_correction": True, "step": steps}
    states = []
    for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        groups = [
            _without_params(group) | fused_adam_keys for group in optimizer.optimizer.param_groups
        ]
        states.append(
            {
                "optimizer": {"param_groups": groups},
                "param_state_sharding_type": FORMAT["distrib_optim_sharding_type"],
            }
        )
    return states[0] if len(states) == 1 else dict(enumerate(states))


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _schedule(plan: Plan, training: Training) -> dict[str, Any]:
    """Return the learning-rate schedule in Megatron-LM's unit, sequences."""
    batch = plan.config.trainer.global_batch_size
    state = training.scheduler.state_dict()
    state |= {
        name: state[name] * batch for name in ("num_steps", "lr_warmup_steps", "lr_decay_steps")
    }
    # weight decay is constant: Megatron-LM compares this length but does not use it
    return state | {"wd_incr_steps": plan.config.trainer.max_steps * batch}


def rng_state() -> ShardedObject:
    """Return this rank's random streams, in the object that Megatron-LM 0.16 writes."""
    return rng_object([_streams()])


def rng_state_by_stage() -> dict[str, ShardedObject]:
    """Return the object of Megatron-LM before and after 0.16, without the data-parallel axis.

    {} without expert parallelism: both objects are then the same. The key is that of `rng_state`
    but the shape is not, so Megatron-Core's check of all shards would report an error.
    """
    if parallel_state.get_expert_model_parallel_world_size() == 1:
        return {}
    return {"rng_state_by_stage": rng_object([_streams()], by_data_rank=False)}


def _streams() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    device_state = torch.cuda.get_rng_state() if has_gpu else torch.get_rng_state()
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": device_state,
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def rng_object(data: list | None, by_data_rank: bool = True) -> ShardedObject:
    """Return the object of this rank's random streams.

    Its axes are the pipeline and tensor rank, with expert parallelism also the data-parallel rank.
    """
    pipeline = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    tensor = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    axes = [pipeline, tensor]
    if by_data_rank and parallel_state.get_expert_model_parallel_world_size() > 1:
        axes = [*axes, (replica, replicas)]
        replica = 0
    return ShardedObject(
        "rng_state",
        data,
        tuple(size for _, size in axes),
        tuple(rank for rank, _ in axes),
        replica_id=replica,
    )


def set_rng_state(data: Any) -> None:
    """Set the random streams from `rng_state`. ValueError, and no change, if they are invalid."""
    try:
        (streams,) = data
        _check_streams(streams)
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise ValueError("the random streams are damaged, or of another kind of device") from error
    random.setstate(streams["random_rng_state"])
    numpy.random.set_state(streams["np_rng_state"])
    torch.set_rng_state(streams["torch_rng_state"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(streams["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(streams["rng_tracker_states"])


def _check_streams(streams: Any) -> None:
    """Raise if a stream is not what `_streams` returns.

    numpy accepts a position beyond its numbers, and would read out of bounds.
    """
    version, words, gauss = streams["random_rng_state"]
    random.Random().setstate((version, words, gauss))
    kind, numbers, position, has_gauss, cached = streams["np_rng_state"]
    numpy.random.RandomState().set_state((kind, numbers, position, has_gauss, cached))
    if kind != "MT19937" or not 0 <= position <= len(numbers):
        raise ValueError
    if type(gauss) not in (float, type(None)):
        raise ValueError
    tracked = streams["rng_tracker_states"]
    if tracked.keys() != tensor_parallel.get_cuda_rng_tracker().get_states().keys():
        raise ValueError
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.Generator().set_state(streams["torch_rng_state"])
    for state in (streams["cuda_rng_state"], *tracked.values()):
        torch.Generator(device).set_state(state)
