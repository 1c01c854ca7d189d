"""The same weights from a seed at every layout, drawn where they live.

Rule: each tensor, and each expert alone, is drawn whole from a generator seeded by (seed, key on
disk, layer, expert) and then cut to its place (shards.py), so neither the layout nor the
implementation changes a number. Draws are fp32 on the CPU on every machine; the layout only decides
who draws what.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.plan import Plan
from mixtrain.engine.shards import Shard, shards


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
                made[id(old)] = torch.nn.Parameter(
                    torch.empty_like(old, device=device), old.requires_grad
                )
                made[id(old)].__dict__.update(old.__dict__)
            module._parameters[name] = made[id(old)]
    # what was never on meta: buffers, parameters of layers that choose their own device
    model.to(device)
    left = [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_meta
    ]
    if left:
        raise RuntimeError(f"tensors without memory after materialise: {', '.join(left)}")


def initialise(model: torch.nn.Module, plan: Plan) -> None:
    """Draw every parameter of this rank's part of the model (one pipeline chunk) in place."""
    shapes = tensor_schema.shapes(plan.config)
    # a buffer has been filled by its module; gate and up are two parts of one tensor: draw it once
    parts = [shard for shard in shards(model) if tensor_schema.init_kind(shard.key) != "buffer"]
    tensors = [
        list(those)
        for _, those in itertools.groupby(parts, lambda shard: (shard.key, shard.numbers))
    ]

    @torch.no_grad()
    def fill(tensor: list[Shard]) -> int:
        key = tensor[0].key
        numbers = tensor[0].numbers
        whole = draw(plan, key, numbers, shapes[key][len(numbers) :])
        for shard in tensor:
            shard.data.copy_(whole[shard.cut])
        return sum(shard.data.numel() for shard in tensor)

    with draws() as pool:
        drawn = sum(pool.map(fill, tensors))
    total = sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    if drawn != total:
        raise RuntimeError(
            f"initialised {drawn} of {total} parameters: a tensor is missing from"
            " sharded_state_dict"
        )


def wholes(plan: Plan, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor of the model as it starts, whole, by key on disk: what `initialise` cuts, without a model."""
    shapes = {
        key: shape
        for key, shape in tensor_schema.shapes(plan.config).items()
        if tensor_schema.init_kind(key) != "buffer"
    }
    drawn = {key: torch.empty(shape, dtype=dtype) for key, shape in shapes.items()}

    def fill(key: str, numbers: tuple[int, ...]) -> None:
        drawn[key][numbers] = draw(plan, key, numbers, shapes[key][len(numbers) :])

    with draws() as pool:
        for key, shape in shapes.items():
            every = list(itertools.product(*map(range, shape[: tensor_schema.stacked_axes(key)])))
            list(pool.map(fill, [key] * len(every), every))
    return drawn


def draws() -> ThreadPoolExecutor:
    """As many tensors at a time as this rank has threads: each is drawn by one. Few, as each is held in fp32."""
    return ThreadPoolExecutor(min(torch.get_num_threads(), 8))


def draw(plan: Plan, key: str, numbers: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in fp32, whole but for `numbers`: its layer and expert. From the plan's seed and its name, nothing else.

    Megatron-Core's defaults for a GPT model: normal with init_method_std, and with std / sqrt(2 * layers) for what
    writes into the residual stream.
    """
    how = tensor_schema.init_kind(key)
    if how == "ones":
        return torch.ones(shape)
    std = plan.config.model.init_method_std
    if how == "scaled":
        std /= math.sqrt(2 * plan.config.model.num_layers)
    digest = hashlib.sha256(
        f"{plan.config.seed}/{key}/{'/'.join(map(str, numbers))}".encode()
    ).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
