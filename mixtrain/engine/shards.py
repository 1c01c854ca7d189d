"""This rank's shards of the full tensors; read and write full tensors by key.

Rule: a shard's slices come from its ShardedTensor (key, global shape, offset); tensor_schema.py
lists the keys. Neither this file nor its callers know a layer's class or a layout.
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
    """A rank's slice of a full tensor. `data` is a view: writing to it writes to the model."""

    key: str  # of config/tensor_schema.py
    numbers: tuple[int, ...]  # layer and expert: indices of the first axes
    slices: tuple[slice, ...]  # of the other axes
    data: torch.Tensor  # [other axes]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this slice of the full tensor: a view with the shape of `data`."""
        return tensor[(*self.numbers, *self.slices)]


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Return the GPTModel inside the wrappers for precision and data parallelism."""
    while hasattr(model, "module"):
        model = model.module
    return model


def shards(model: torch.nn.Module) -> Iterator[Shard]:
    """Yield the shards of a model chunk; gate and up of SwiGLU are separate shards."""
    tree = {"model": unwrap(model).sharded_state_dict()}
    apply_factories(tree)
    for tensor in _leaves(tree):
        axes = tensor.prepend_axis_num
        sizes = tensor.local_shape[-(len(tensor.global_shape) - axes) :]
        starts = tensor.global_offset[axes:]
        # the layer is a prepended axis or a number in the key
        numbers = (
            tuple(int(number) for number in re.findall(r"\.(\d+)\.", tensor.key))
            + tensor.global_offset[:axes]
        )
        slices = tuple(
            slice(start, start + size) for start, size in zip(starts, sizes, strict=True)
        )
        key = re.sub(r"\.\d+\.", ".", tensor.key)
        yield Shard(key, tuple(numbers), slices, tensor.data.view(sizes))


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
    """Return copies of the full tensors by key, from the chunks of a model that is on one rank."""
    shapes = tensor_schema.shapes(plan.config)
    tensors = {}
    copied = dict.fromkeys(shapes, 0)
    for chunk in chunks:
        for shard in shards(chunk):
            tensor = tensors.setdefault(shard.key, shard.data.new_empty(shapes[shard.key]))
            shard.of(tensor).copy_(shard.data)
            copied[shard.key] += shard.data.numel()
    incomplete = [
        key for key, count in copied.items() if key not in tensors or count != tensors[key].numel()
    ]
    if incomplete:
        raise RuntimeError(f"this rank does not hold all of {', '.join(incomplete)}")
    return tensors


@torch.no_grad()
def fill(chunks: Iterable[torch.nn.Module], tensors: dict[str, torch.Tensor]) -> None:
    """Copy full tensors into this rank's shards, at any layout. KeyError if a key is missing."""
    for chunk in chunks:
        for shard in shards(chunk):
            shard.data.copy_(shard.of(tensors[shard.key]))


@contextlib.contextmanager
def substitute_parameters(
    chunks: Iterable[torch.nn.Module], value: Callable[[torch.nn.Parameter], torch.Tensor]
) -> Iterator[None]:
    """Within the block every parameter holds `value(parameter)`, for example its gradient.

    So that `shards` and `read` give those values.
    """
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data.copy_(value(parameter))
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data.copy_(original)
