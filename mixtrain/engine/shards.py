"""Where each part of the model on this rank lies in the whole: read, written and compared by place.

Rule: a tensor's place is its ShardedTensor (key, global shape, offset), and tensor_schema.py lists
the keys. Nothing here, or in who uses it, knows a layer's class or a layout.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from mixtrain.config import tensor_schema
from mixtrain.config.plan import Plan


class Shard(NamedTuple):
    """A part of a whole tensor on this rank. `data` is a view: writing to it writes to the model."""

    key: str  # of config/tensor_schema.py
    # the layer, and the expert: those of the whole tensor's axes that are cut one by one
    numbers: tuple[int, ...]
    cut: tuple[slice, ...]  # along the axes that follow
    data: torch.Tensor  # with the axes that follow

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of the whole tensor, a view of the shape of `data`."""
        return whole[(*self.numbers, *self.cut)]


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside the wrappers for precision and data parallelism: what names and checkpoints are about."""
    while hasattr(model, "module"):
        model = model.module
    return model


def shards(model: torch.nn.Module) -> Iterator[Shard]:
    """Every part of a model chunk, gate and up of SwiGLU as parts of their own."""
    tree = {"model": unwrap(model).sharded_state_dict()}
    apply_factories(tree)
    for tensor in _leaves(tree):
        axes = tensor.prepend_axis_num
        sizes = tensor.local_shape[-(len(tensor.global_shape) - axes) :]
        starts = tensor.global_offset[axes:]
        # the layer is an axis before the tensor, or a number in the key
        numbers = (
            tuple(int(number) for number in re.findall(r"\.(\d+)\.", tensor.key))
            + tensor.global_offset[:axes]
        )
        cut = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        yield Shard(
            re.sub(r"\.\d+\.", ".", tensor.key), tuple(numbers), cut, tensor.data.view(sizes)
        )


def _leaves(node: object) -> Iterator[ShardedTensor]:
    if isinstance(node, ShardedTensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _leaves(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _leaves(value)


@torch.no_grad()
def read(plan: Plan, chunks: Iterable[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Key -> a copy of the whole tensor, of the chunks of a model that lies on one rank."""
    shapes = tensor_schema.shapes(plan.config)
    wholes = {}
    written = dict.fromkeys(shapes, 0)
    for chunk in chunks:
        for shard in shards(chunk):
            whole = wholes.setdefault(shard.key, shard.data.new_empty(shapes[shard.key]))
            shard.of(whole).copy_(shard.data)
            written[shard.key] += shard.data.numel()
    missing = [
        key for key, count in written.items() if key not in wholes or count != wholes[key].numel()
    ]
    if missing:
        raise RuntimeError(f"this rank does not hold all of {', '.join(missing)}")
    return wholes


@torch.no_grad()
def fill(chunks: Iterable[torch.nn.Module], wholes: dict[str, torch.Tensor]) -> None:
    """Write each part of this rank's chunks from the whole tensors, at any layout. KeyError if one is not there."""
    for chunk in chunks:
        for shard in shards(chunk):
            shard.data.copy_(shard.of(wholes[shard.key]))


@contextlib.contextmanager
def standing_in(
    chunks: Iterable[torch.nn.Module], value: Callable[[torch.nn.Parameter], torch.Tensor]
) -> Iterator[None]:
    """Within the block every parameter holds `value(parameter)`, such as its gradient, to be read by place."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data.copy_(value(parameter))
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data.copy_(data)
