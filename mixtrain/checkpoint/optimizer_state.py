"""The optimizer's state as boxes of whole tensors: what each rank holds of it, by the parameter's key and place.

On disk it is Megatron-Core's fully reshardable format: optimizer.state.{param, exp_avg, exp_avg_sq}.<key of the
parameter>, fp32, with the parameter's whole shape. Upstream gathers every parameter on one rank to write it, and reads
more than a rank needs; here a rank writes and reads the boxes of its own flat range, in place. Rule: nothing here knows
a layout; which elements of a parameter a rank holds is Megatron-Core's range map, or all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mixtrain.checkpoint.slices import boxes
from mixtrain.engine.optimizer import Training
from mixtrain.engine.shards import unwrap

# what a step leaves behind for each parameter, by the inner optimizer's own names; Adam also counts
# its steps
STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
# Megatron-Core's lists of the model's and its own
BF16_GROUPS = ("float16_groups", "fp32_from_float16_groups")


class Held(NamedTuple):
    """What a rank's optimizer holds of one parameter of the model."""

    inner: torch.optim.Optimizer
    parameter: torch.nn.Parameter
    main: torch.Tensor  # what is stepped: fp32, flat, or the parameter itself
    start: int  # the elements of the flattened parameter that it stands for
    stop: int
    replicas: int | None  # which copy of its shard this is; None: as the parameter's


def held(training: Training) -> Iterator[Held]:
    """Everything that this rank's optimizers step."""
    for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        if isinstance(optimizer, DistributedOptimizer):
            yield from _sharded(optimizer)
        else:
            groups = zip(*(getattr(optimizer, name, []) for name in BF16_GROUPS), strict=True)
            models = {id(main): model for pair in groups for model, main in zip(*pair, strict=True)}
            for main in optimizer.get_parameters():  # those of an fp32 model are the model's own
                yield Held(
                    optimizer.optimizer, models.get(id(main), main), main, 0, main.numel(), None
                )


def _sharded(optimizer: DistributedOptimizer) -> Iterator[Held]:
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, place in bucket["param_map"].items():
                    group, number = optimizer.model_param_group_index_map[parameter]
                    main = optimizer.optimizer.param_groups[group]["params"][number]
                    part = place["param"]
                    copy = optimizer.distributed_optimizer_instance_id
                    yield Held(optimizer.optimizer, parameter, main, part.start, part.end, copy)


def fill(training: Training, kind: str) -> None:
    """Give the optimizers the state of a run before its first step, where they have none: they make it in a step."""
    for one in held(training):
        state = one.inner.state[one.main]
        for name in STATES[kind]:
            if state.get(name) is None:
                state[name] = torch.zeros_like(one.main, dtype=torch.float32)
        if counts_by_parameter(one.inner) and "step" not in state:
            # where fused Adam wants it
            state["step"] = torch.zeros((), dtype=torch.float32, device=one.main.device)


def counts_by_parameter(inner: torch.optim.Optimizer) -> bool:
    """PyTorch's Adam counts steps for each parameter; Apex's and Transformer Engine's for each group."""
    return isinstance(inner, torch.optim.Adam)  # AdamW is one


def steps_done(training: Training) -> int:
    """Steps that Adam has counted, which its bias correction needs; 0 of SGD. All parameters are stepped together."""
    for one in held(training):
        counted = one.inner.state[one.main].get("step") if counts_by_parameter(one.inner) else None
        if counted is None:
            counted = max((group.get("step", 0) for group in one.inner.param_groups), default=0)
        return int(counted)
    return 0


def set_steps(training: Training, steps: int) -> None:
    """Make Adam go on from its step `steps`: a counter of its own for each parameter, as a step adds to each."""
    for one in held(training):
        if counts_by_parameter(one.inner):
            one.inner.state[one.main]["step"].fill_(float(steps))
        elif not isinstance(one.inner, torch.optim.SGD):
            for group in one.inner.param_groups:
                group["step"] = steps


def sharded(training: Training, kind: str) -> list[ShardedTensor]:
    """The state of this rank as ShardedTensors whose data are views of it: to be written, or to be read into."""
    places = _Places(training)
    found = []
    for one in held(training):
        state = one.inner.state[one.main]
        tensors = {"param": one.main.data, **{name: state[name] for name in STATES[kind]}}
        for name, tensor in tensors.items():
            for leaf, first in places.of(one.parameter):
                found += _boxes_of(
                    one, f"optimizer.state.{name}.{leaf.key}", tensor.view(-1), leaf, first
                )
    return found


def _boxes_of(
    one: Held, key: str, flat: torch.Tensor, leaf: ShardedTensor, first: int
) -> Iterator[ShardedTensor]:
    """What this rank holds of one leaf, which begins at element `first` of its parameter."""
    axes = leaf.prepend_axis_num
    start = max(one.start, first)
    stop = min(one.stop, first + leaf.data.numel())
    for box in boxes(leaf.local_shape, start - first, stop - first, base=first):
        size = (1,) * axes + box.size
        inner = (*(0,) * axes, *box.offset)
        yield ShardedTensor(
            key=key,
            data=flat[box.start - one.start : box.stop - one.start].view(size),
            dtype=flat.dtype,
            local_shape=size,
            global_shape=leaf.global_shape,
            global_offset=tuple(a + b for a, b in zip(leaf.global_offset, inner, strict=True)),
            axis_fragmentations=None,  # boxes of several sizes are no grid
            replica_id=leaf.replica_id
            if one.replicas is None
            else (*leaf.replica_id[:-1], one.replicas),
        )


class _Places:
    """Which ShardedTensors a parameter consists of: those whose data lie in its memory."""

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
        """(leaf, the element of the flattened parameter that it begins with), in the parameter's order."""
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
                    f"no part of a checkpoint holds element {covered} of a parameter"
                    f" {tuple(parameter.shape)}"
                )
            yield leaf, covered
            covered = covered + leaf.data.numel()
            number = number + 1
