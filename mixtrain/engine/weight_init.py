"""Initial weights: the same from a seed at every layout; each rank draws what it holds.

Rule: a generator seeded by (seed, key on disk, layer, expert) draws each full tensor, expert by
expert; the rank then keeps its slices (shards.py). So neither layout nor layer implementation
changes a number. Draws are fp32 on the CPU on every machine; the layout only decides which rank
draws which tensor.
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
    """Allocate every meta parameter on `device`, with the attributes that Megatron-Core set.

    Module.to_empty would lose tensor_model_parallel, sequence_parallel and allreduce.
    """
    allocated: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None or not old.is_meta:
                continue
            if id(old) not in allocated:
                data = torch.empty_like(old, device=device)
                allocated[id(old)] = torch.nn.Parameter(data, old.requires_grad)
                allocated[id(old)].__dict__.update(old.__dict__)
            module._parameters[name] = allocated[id(old)]
    # buffers, and parameters of layers that choose their own device, were never on meta
    model.to(device)
    still_meta = [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_meta
    ]
    if still_meta:
        raise RuntimeError(f"tensors without memory after materialise: {', '.join(still_meta)}")


def initialise(model: torch.nn.Module, plan: Plan) -> None:
    """Draw every parameter of this rank's model chunk in place."""
    shapes = tensor_schema.shapes(plan.config)
    # modules fill their buffers themselves
    drawn = [shard for shard in shards(model) if tensor_schema.init_kind(shard.key) != "buffer"]
    # gate and up are two shards of one tensor, which is drawn once
    groups = itertools.groupby(drawn, lambda shard: (shard.key, shard.numbers))
    tensors = [list(group) for _, group in groups]

    @torch.no_grad()
    def fill(group: list[Shard]) -> int:
        key = group[0].key
        numbers = group[0].numbers
        tensor = draw(plan, key, numbers, shapes[key][len(numbers) :])
        for shard in group:
            shard.data.copy_(tensor[shard.slices])
        return sum(shard.data.numel() for shard in group)

    with draw_pool() as pool:
        initialised = sum(pool.map(fill, tensors))
    total = sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    if initialised != total:
        raise RuntimeError(
            f"initialised {initialised} of {total} parameters: a tensor is missing from"
            " sharded_state_dict"
        )


def initial_tensors(plan: Plan, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the full initial tensors by key on disk, without building a model."""
    shapes = {
        key: shape
        for key, shape in tensor_schema.shapes(plan.config).items()
        if tensor_schema.init_kind(key) != "buffer"
    }
    tensors = {key: torch.empty(shape, dtype=dtype) for key, shape in shapes.items()}

    def fill(key: str, numbers: tuple[int, ...]) -> None:
        tensors[key][numbers] = draw(plan, key, numbers, shapes[key][len(numbers) :])

    with draw_pool() as pool:
        for key, shape in shapes.items():
            every = list(itertools.product(*map(range, shape[: tensor_schema.stacked_axes(key)])))
            list(pool.map(fill, [key] * len(every), every))
    return tensors


def draw_pool() -> ThreadPoolExecutor:
    """Return a pool with a thread per tensor, at most 8: each holds a full tensor in fp32."""
    return ThreadPoolExecutor(min(torch.get_num_threads(), 8))


def draw(plan: Plan, key: str, numbers: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Draw a full fp32 tensor of one layer and expert (`numbers`) from the plan's seed and the key.

    Megatron-Core's defaults for a GPT model: normal with init_method_std, and with std / sqrt(2 *
    layers) for weights that write into the residual stream.
    """
    kind = tensor_schema.init_kind(key)
    if kind in ("ones", "zeros"):
        return torch.ones(shape) if kind == "ones" else torch.zeros(shape)
    std = plan.config.model.init_method_std
    if kind == "scaled":
        std /= math.sqrt(2 * plan.config.model.num_layers)
    digest = hashlib.sha256(
        f"{plan.config.seed}/{key}/{'/'.join(map(str, numbers))}".encode()
    ).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
