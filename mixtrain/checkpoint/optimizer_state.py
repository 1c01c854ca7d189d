"""The optimizer's state as slices of global tensors, addressed by the parameter's key and offset.

On disk it is Megatron-Core's fully reshardable format: optimizer.state.{param, exp_avg, exp_avg_sq}
.<key of the parameter>, fp32, with the parameter's global shape. Megatron-Core gathers every
parameter on one rank to write it, and reads more than a rank needs; here a rank writes and reads
only the slices of its own flat range, in place. Rule: nothing here depends on the layout; which
elements of a parameter a rank has comes from Megatron-Core's range map, or is all of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mixtrain.checkpoint.slices import slices_of_range
from mixtrain.engine.optimizer import Training
from mixtrain.engine.shards import unwrap

# the state of each parameter, by the inner optimizer's names; Adam also counts its steps
STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
# attributes of Megatron-Core's optimizer: the model's parameters, and its fp32 copies
BF16_GROUPS = ("float16_groups", "fp32_from_float16_groups")


class OptimizerShard(NamedTuple):
    """The elements of one model parameter that this rank's optimizer updates."""

    inner: torch.optim.Optimizer
    parameter: torch.nn.Parameter
    main: torch.Tensor  # the tensor that is updated: fp32, flat, or the parameter itself
    # elements start..stop of the flattened parameter
    start: int
    stop: int
    replica: int | None  # which copy of its shard this is; None: the parameter's replica_id


def optimizer_shards(training: Training) -> Iterator[OptimizerShard]:
    """Yield everything that this rank's optimizers update."""
    for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        if isinstance(optimizer, DistributedOptimizer):
            yield from _distributed_shards(optimizer)
            continue
        groups = zip(*(getattr(optimizer, name, []) for name in BF16_GROUPS), strict=True)
        parameters = {
            id(main): parameter for pair in groups for parameter, main in zip(*pair, strict=True)
        }
        for main in optimizer.get_parameters():  # in an fp32 model, the model's parameters
            parameter = parameters.get(id(main), main)
            yield OptimizerShard(optimizer.optimizer, parameter, main, 0, main.numel(), None)


def _distributed_shards(optimizer: DistributedOptimizer) -> Iterator[OptimizerShard]:
    replica = optimizer.distributed_optimizer_instance_id
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, range_map in bucket["param_map"].items():
                    group, number = optimizer.model_param_group_index_map[parameter]
                    main = optimizer.optimizer.param_groups[group]["params"][number]
                    elements = range_map["param"]
                    yield OptimizerShard(
                        optimizer.optimizer,
                        parameter,
                        main,
                        elements.start,
                        elements.end,
                        replica,
                    )


def initialize(training: Training, kind: str) -> None:
    """Create missing optimizer state, which optimizers create in their first step, with zeros."""
    for shard in optimizer_shards(training):
        state = shard.inner.state[shard.main]
        for name in STATES[kind]:
            if state.get(name) is None:
                state[name] = torch.zeros_like(shard.main, dtype=torch.float32)
        if counts_by_parameter(shard.inner) and "step" not in state:
            # on the parameter's device, which fused Adam requires
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.main.device)


def counts_by_parameter(inner: torch.optim.Optimizer) -> bool:
    """Return whether steps are counted for each parameter (PyTorch's Adam), not for each group.

    Apex's and Transformer Engine's Adam count for each group.
    """
    return isinstance(inner, torch.optim.Adam)  # AdamW is a subclass


def steps_done(training: Training) -> int:
    """Return Adam's step count, which its bias correction needs; 0 for SGD.

    All parameters have the same count.
    """
    for shard in optimizer_shards(training):
        steps = None
        if counts_by_parameter(shard.inner):
            steps = shard.inner.state[shard.main].get("step")
        if steps is None:
            steps = max((group.get("step", 0) for group in shard.inner.param_groups), default=0)
        return int(steps)
    return 0


def set_steps(training: Training, steps: int) -> None:
    """Set Adam's step count to `steps`: for each parameter, or for each parameter group."""
    for shard in optimizer_shards(training):
        if counts_by_parameter(shard.inner):
            # in place: each parameter has its own counter
            shard.inner.state[shard.main]["step"].fill_(float(steps))
        elif not isinstance(shard.inner, torch.optim.SGD):
            for group in shard.inner.param_groups:
                group["step"] = steps


def sharded(training: Training, kind: str) -> list[ShardedTensor]:
    """Return this rank's state as ShardedTensors that view it, to write it or to read into it."""
    leaves = _ParameterLeaves(training)
    tensors = []
    for shard in optimizer_shards(training):
        state = shard.inner.state[shard.main]
        named = {"param": shard.main.data, **{name: state[name] for name in STATES[kind]}}
        for name, tensor in named.items():
            for leaf, first in leaves.of(shard.parameter):
                key = f"optimizer.state.{name}.{leaf.key}"
                tensors += _slices_of_leaf(shard, key, tensor.view(-1), leaf, first)
    return tensors


def _slices_of_leaf(
    shard: OptimizerShard, key: str, flat: torch.Tensor, leaf: ShardedTensor, first: int
) -> Iterator[ShardedTensor]:
    """Yield this rank's slices of one leaf, which begins at element `first` of its parameter."""
    axes = leaf.prepend_axis_num
    start = max(shard.start, first)
    stop = min(shard.stop, first + leaf.data.numel())
    replica_id = leaf.replica_id
    if shard.replica is not None:
        replica_id = (*leaf.replica_id[:-1], shard.replica)
    for slice_ in slices_of_range(leaf.local_shape, start - first, stop - first, base=first):
        size = (1,) * axes + slice_.size
        offset = (*(0,) * axes, *slice_.offset)
        yield ShardedTensor(
            key=key,
            data=flat[slice_.start - shard.start : slice_.stop - shard.start].view(size),
            dtype=flat.dtype,
            local_shape=size,
            global_shape=leaf.global_shape,
            global_offset=tuple(a + b for a, b in zip(leaf.global_offset, offset, strict=True)),
            axis_fragmentations=None,  # slices of different sizes form no grid
            replica_id=replica_id,
        )


class _ParameterLeaves:
    """Finds the ShardedTensors of a parameter: those whose data lie in its memory."""

    def __init__(self, training: Training):
        tree = {
            number: unwrap(chunk).sharded_state_dict()
            for number, chunk in enumerate(training.chunks)
        }
        apply_factories(tree)
        leaves = [leaf for leaf in nested_values(tree) if isinstance(leaf, ShardedTensor)]
        self.leaves = sorted(leaves, key=lambda leaf: leaf.data.data_ptr())
        self.starts = [leaf.data.data_ptr() for leaf in self.leaves]

    def of(self, parameter: torch.nn.Parameter) -> Iterator[tuple[ShardedTensor, int]]:
        """Yield (leaf, its first element in the flattened parameter), in the parameter's order."""
        begin = parameter.data_ptr()
        size = parameter.element_size()
        covered = 0
        number = bisect_right(self.starts, begin - 1)
        while covered < parameter.numel():
            leaf = self.leaves[number] if number < len(self.leaves) else None
            if (
                leaf is None
                or self.starts[number] != begin + covered * size
                or not leaf.data.is_contiguous()
            ):
                raise RuntimeError(
                    f"no tensor of a checkpoint holds element {covered} of a parameter"
                    f" {tuple(parameter.shape)}"
                )
            yield leaf, covered
            covered += leaf.data.numel()
            number += 1
