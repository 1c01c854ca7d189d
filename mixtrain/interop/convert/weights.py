"""A whole model's tensors from Hugging Face's names to Megatron-Core's and back, in memory.

Rule: every tensor that the configuration implies is there, with its shape and one dtype, and no
other; else a UserError says what differs. Nothing is cast, padded, transposed or left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.schema import Config
from mixtrain.errors import UserError
from mixtrain.interop.convert.hf_config import problems
from mixtrain.interop.convert.tensor_mapping import LAYOUTS, pieces

DTYPES = (torch.float32, torch.bfloat16)  # what mixtrain keeps weights in
SHOWN = 5  # problems of a kind; with a wrong size every tensor has one


def to_megatron(config: Config, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors, in either layout, as Megatron-Core's whole tensors (tensor_schema.py): new memory."""
    mixtral(config)
    parts = list(pieces(config, layout_of(config, tensors)))
    check({name: shape for part in parts for name, shape in part.shapes().items()}, tensors)
    like = next(iter(tensors.values()))
    wholes = {key: like.new_empty(shape) for key, shape in tensor_schema.shapes(config).items()}
    for part in parts:
        part.write(wholes[part.key][part.numbers], tensors)
    return wholes


def to_hugging_face(
    config: Config, wholes: dict[str, torch.Tensor], layout: str = "hub"
) -> dict[str, torch.Tensor]:
    """Megatron-Core's whole tensors under Hugging Face's names: views of them, but for q, k and v of several groups."""
    mixtral(config)
    check(tensor_schema.shapes(config), wholes)
    found: dict[str, torch.Tensor] = {}
    for part in pieces(config, layout):
        found |= part.read(wholes[part.key][part.numbers])
    return found


def mixtral(config: Config) -> None:
    """UserError with every reason why the configuration's model is not a Hugging Face Mixtral."""
    if found := problems(config):
        raise UserError(*found)


def layout_of(config: Config, names: Iterable[str]) -> str:
    """Which layout the names are of: `hub` or `fused`. UserError if of both or neither."""
    given = set(names)
    every = {
        layout: {name for part in pieces(config, layout) for name in part.names}
        for layout in LAYOUTS
    }
    common = set.intersection(*every.values())
    of = {layout: sorted(given & every[layout] - common) for layout in LAYOUTS}
    if all(of.values()):
        raise UserError(
            f"two layouts at once: {of['hub'][0]} (files) and {of['fused'][0]} (transformers 5 in"
            " memory)"
        )
    if not any(of.values()):
        either = " nor ".join(min(every[layout] - common) for layout in LAYOUTS)
        raise UserError(
            f"no router or expert of a Mixtral is among the {len(given)} tensors: neither {either}"
        )
    return "hub" if of["hub"] else "fused"


def check(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any], dtypes=DTYPES, mixed=False
) -> None:
    """UserError if the tensors are not those of `shapes`, by name, shape and dtype: one for all, unless `mixed`."""
    there = [name for name in shapes if name in tensors]
    usual = tensors[there[0]].dtype if there else DTYPES[0]
    found = [
        *first(
            f"{name} is missing, of shape {shape}"
            for name, shape in shapes.items()
            if name not in tensors
        ),
        *first(f"{name} is not a tensor of this model" for name in tensors if name not in shapes),
        *first(
            f"{name} has shape {tuple(tensors[name].shape)}; the configuration makes it"
            f" {shapes[name]}"
            for name in there
            if tuple(tensors[name].shape) != shapes[name]
        ),
    ]
    if usual not in dtypes:
        found.append(f"{there[0]} is {usual}; weights are {' or '.join(map(str, dtypes))}")
    if not mixed:
        found += first(
            f"{name} is {tensors[name].dtype}, but {there[0]} is {usual}; all must be the same;"
            " --dtype fp32, bf16 or fp16 makes them so"
            for name in there
            if tensors[name].dtype != usual
        )
    if found:
        raise UserError(*found)


def first(found: Iterable[str]) -> list[str]:
    """The first problems of a kind, and how many more there are."""
    lines = list(found)
    more = [f"... and {len(lines) - SHOWN} more such tensors"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more
