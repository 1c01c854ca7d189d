"""The same weights from a seed at every layout, drawn where they live.

Rule: a tensor's place is its ShardedTensor (key, global shape, offset). Each tensor, and each expert alone, is drawn
whole from a generator seeded by (seed, global name, layer, expert) and then cut to the shard, so neither the layout nor
the implementation changes a number. Draws are fp32 on the CPU on every machine; the layout only decides who draws what.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from mixtrain.plan import Plan

# How a tensor starts, by the end of its global name. Megatron-Core's defaults for a GPT model: normal with
# init_method_std, and with std / sqrt(2 * layers) for what writes into the residual stream.
# fmt: off
RECIPES = [
    ("word_embeddings.weight", "normal"),
    ("output_layer.weight",    "normal"),
    ("linear_qkv.weight",      "normal"),
    ("linear_proj.weight",     "scaled"),
    ("router.weight",          "normal"),
    ("linear_fc1.weight",      "normal"),
    ("linear_fc2.weight",      "scaled"),
    ("layer_norm_weight",      "ones"),
    ("layernorm.weight",       "ones"),
]
# fmt: on


def materialise(model: torch.nn.Module, device: torch.device) -> None:
    """Give every meta parameter memory on `device`, with the attributes that Megatron-Core has put on it.

    Unlike Module.to_empty, which loses tensor_model_parallel, sequence_parallel and allreduce.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                made[id(old)] = torch.nn.Parameter(torch.empty_like(old, device=device), old.requires_grad)
                made[id(old)].__dict__.update(old.__dict__)
            module._parameters[name] = made[id(old)]
    model.to(device)  # what was never on meta: buffers, parameters of layers that choose their own device
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"tensors without memory after materialise: {', '.join(left)}")


@torch.no_grad()
def initialise(model: torch.nn.Module, plan: Plan) -> None:
    """Draw every parameter of this rank's part of the model (one pipeline chunk) in place."""
    drawn, last = 0, ("", torch.empty(0))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for shard in sharded_tensors(model):
        if shard.data.untyped_storage().data_ptr() not in parameters:
            continue  # a buffer, which its module has filled
        name, prefix = place(shard)
        part = shard.prepend_axis_num
        seed = f"{plan.config.seed}/{name}/{'/'.join(map(str, prefix))}"
        if last[0] != seed:  # gate and up are two shards of one tensor: draw it once
            last = (seed, draw(seed, name, tuple(shard.global_shape[part:]), plan))
        cut = tuple(
            slice(start, start + size)
            for start, size in zip(
                shard.global_offset[part:], shard.local_shape[-(len(shard.global_shape) - part) :], strict=True
            )
        )
        shard.data.copy_(last[1][cut].view(shard.data.shape))
        drawn += shard.data.numel()
    total = sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    if drawn != total:
        raise RuntimeError(f"initialised {drawn} of {total} parameters: a tensor is missing from sharded_state_dict")


def sharded_tensors(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    """Every ShardedTensor of a model chunk, factories (gate and up of SwiGLU) taken apart into views."""
    tree = {"model": model.sharded_state_dict()}
    apply_factories(tree)

    def walk(node: object) -> Iterator[ShardedTensor]:
        if isinstance(node, ShardedTensor):
            yield node
        elif isinstance(node, dict):
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                yield from walk(value)

    return walk(tree)


def place(shard: ShardedTensor) -> tuple[str, tuple[int, ...]]:
    """(global name without numbers, the indices that go before the tensor's own axes: layer, expert).

    The layer is an axis before the tensor in some versions and layouts and a number in the key in others.
    """
    numbers = tuple(int(number) for number in re.findall(r"\.(\d+)\.", shard.key))
    name = re.sub(r"\.\d+\.", ".", shard.key)
    return name, numbers + tuple(shard.global_offset[: shard.prepend_axis_num])


def draw(seed: str, name: str, shape: tuple[int, ...], plan: Plan) -> torch.Tensor:
    """The whole global tensor `name` in fp32, from `seed` and nothing else."""
    how = next((how for ending, how in RECIPES if name.endswith(ending)), None)
    if how is None:
        raise RuntimeError(f"no row of RECIPES in mixtrain/init.py says how {name} starts")
    if how == "ones":
        return torch.ones(shape)
    std = plan.config.model.init_method_std
    if how == "scaled":
        std /= math.sqrt(2 * plan.config.model.num_layers)
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
