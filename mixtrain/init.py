"""The same weights from a seed at every layout, drawn where they live.

Rule: each tensor, and each expert alone, is drawn whole from a generator seeded by (seed, key on disk, layer, expert)
and then cut to its place (places.py), so neither the layout nor the implementation changes a number. Draws are fp32
on the CPU on every machine; the layout only decides who draws what.
"""

from __future__ import annotations

import hashlib
import itertools
import math

import torch

from mixtrain import contract, places
from mixtrain.plan import Plan


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
    shapes = contract.shapes(plan.config)
    for shard in places.shards(model):
        if contract.starts(shard.key) == "buffer":
            continue  # its module has filled it
        seed = seed_of(plan, shard.key, shard.numbers)
        if last[0] != seed:  # gate and up are two parts of one tensor: draw it once
            last = (seed, draw(seed, shard.key, shapes[shard.key][len(shard.numbers) :], plan))
        shard.data.copy_(last[1][shard.cut])
        drawn += shard.data.numel()
    total = sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    if drawn != total:
        raise RuntimeError(f"initialised {drawn} of {total} parameters: a tensor is missing from sharded_state_dict")


def seed_of(plan: Plan, key: str, numbers: tuple[int, ...]) -> str:
    """`numbers`: the layer and the expert, of a tensor that has them."""
    return f"{plan.config.seed}/{key}/{'/'.join(map(str, numbers))}"


def wholes(plan: Plan, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor of the model as it starts, whole, by key on disk: what `initialise` cuts, without a model."""
    drawn = {}
    for key, shape in contract.shapes(plan.config).items():
        if contract.starts(key) == "buffer":
            continue
        drawn[key] = torch.empty(shape, dtype=dtype)
        axes = contract.stacked(key)
        for numbers in itertools.product(*map(range, shape[:axes])):
            drawn[key][numbers] = draw(seed_of(plan, key, numbers), key, shape[axes:], plan)
    return drawn


def draw(seed: str, key: str, shape: tuple[int, ...], plan: Plan) -> torch.Tensor:
    """A tensor in fp32, whole but for its layer and expert, from `seed` and nothing else.

    Megatron-Core's defaults for a GPT model: normal with init_method_std, and with std / sqrt(2 * layers) for what
    writes into the residual stream.
    """
    how = contract.starts(key)
    if how == "ones":
        return torch.ones(shape)
    std = plan.config.model.init_method_std
    if how == "scaled":
        std /= math.sqrt(2 * plan.config.model.num_layers)
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
