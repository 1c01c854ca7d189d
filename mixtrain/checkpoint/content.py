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
from mixtrain.config.schema import plain
from mixtrain.engine.optimizer import Training
from mixtrain.engine.shards import unwrap


def sharded(plan: Plan, training: Training) -> dict[str, Any]:
    """All that lies in shards: the model's tensors, the optimizer's, the random streams. Views, not copies."""
    kind = plain(plan.config.optimizer.optimizer)
    optimizer_state.fill(training, kind)
    return {
        **model(training.chunks),
        "extra_states": extra_states(training),
        "optimizer_state": optimizer_state.sharded(training, kind),
        "rng_state": rng_state(),
    }


def model(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """The sharded state dict of this rank's model chunks: `model`, or `model0`, `model1` ... with virtual stages."""
    states = [unwrap(chunk).sharded_state_dict() for chunk in chunks]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}


def extra_states(training: Training) -> list[ShardedObject]:
    """An empty object for each that Transformer Engine's modules would have written, where this model's do not.

    Megatron-LM asks for every one of them, and refuses a checkpoint that lacks one.
    """
    tree = model(training.chunks)
    apply_factories(tree)
    leaves = list(nested_values(tree))
    there = {leaf.unique_key for leaf in leaves if isinstance(leaf, ShardedObject)}
    found = {}
    for leaf in leaves:
        key = tensor_schema.extra_state(leaf.key)
        axes = leaf.prepend_axis_num if isinstance(leaf, ShardedTensor) else None
        if (
            key is None
            or axes is None
            or any(leaf.global_offset[axes:])
            or not is_main_replica(leaf.replica_id)
        ):
            continue  # one rank writes it: that which has the first element of the weight
        place = ShardedObject(
            key, None, leaf.global_shape[:axes] or (1,), leaf.global_offset[:axes] or (0,)
        )
        if place.unique_key not in there:
            found[place.unique_key] = place
    return list(found.values())


def common(plan: Plan, training: Training, state: RunState) -> dict[str, Any]:
    """What is the same on every rank: common.pt, as Megatron-LM's loader reads it."""
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
    """The settings of the parameter groups, for Megatron-LM: a run of mixtrain has them from its configuration."""
    # Apex's and Transformer Engine's Adam have a key that PyTorch's has not, and take a group as it
    # is on the disk
    own = {"bias_correction": True, "step": steps}
    found = [
        {
            "optimizer": {
                "param_groups": [
                    _without_params(group) | own for group in optimizer.optimizer.param_groups
                ]
            },
            "param_state_sharding_type": FORMAT["distrib_optim_sharding_type"],
        }
        for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer])
    ]
    return found[0] if len(found) == 1 else dict(enumerate(found))


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _schedule(plan: Plan, training: Training) -> dict[str, Any]:
    """The learning-rate schedule as Megatron-LM counts it, in sequences."""
    batch = plan.config.trainer.global_batch_size
    state = training.scheduler.state_dict()
    state |= {
        name: state[name] * batch for name in ("num_steps", "lr_warmup_steps", "lr_decay_steps")
    }
    # weight decay is constant: how long it would rise is compared, and not used
    return state | {"wd_incr_steps": plan.config.trainer.max_steps * batch}


def rng_state() -> ShardedObject:
    """This rank's random streams, in the object that Megatron-LM 0.16 makes of them."""
    return rng_object([_streams()])


def rng_state_by_stage() -> dict[str, ShardedObject]:
    """The same as Megatron-LM makes it before and after 0.16, without the data-parallel axis; {} if there is none.

    Of one key with the former and of another shape, which a check of all shards takes for a fault.
    """
    if parallel_state.get_expert_model_parallel_world_size() == 1:
        return {}
    return {"rng_state_by_stage": rng_object([_streams()], by_data_rank=False)}


def _streams() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state()
        if torch.cuda.is_available()
        else torch.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def rng_object(data: list | None, by_data_rank: bool = True) -> ShardedObject:
    """Its place: by pipeline and tensor rank, and with expert parallelism by data-parallel rank too."""
    pipeline = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    tensor = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    axes = [pipeline, tensor]
    if by_data_rank and parallel_state.get_expert_model_parallel_world_size() > 1:
        axes = [*axes, (copy, copies)]
        copy = 0
    return ShardedObject(
        "rng_state",
        data,
        tuple(size for _, size in axes),
        tuple(rank for rank, _ in axes),
        replica_id=copy,
    )


def set_rng_state(data: Any) -> None:
    """Go on with the random streams in the data of `rng_state`. ValueError, with nothing changed, if they are none."""
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
    """Raises if one is not what `_streams` makes. numpy takes a place beyond its numbers, and would read there."""
    version, words, gauss = streams["random_rng_state"]
    random.Random().setstate((version, words, gauss))
    kind, numbers, place, has_gauss, cached = streams["np_rng_state"]
    numpy.random.RandomState().set_state((kind, numbers, place, has_gauss, cached))
    if (
        kind != "MT19937"
        or not 0 <= place <= len(numbers)
        or type(gauss) not in (float, type(None))
    ):
        raise ValueError
    tracked = streams["rng_tracker_states"]
    if tracked.keys() != tensor_parallel.get_cuda_rng_tracker().get_states().keys():
        raise ValueError
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.Generator().set_state(streams["torch_rng_state"])
    for state in (streams["cuda_rng_state"], *tracked.values()):
        torch.Generator(device).set_state(state)
