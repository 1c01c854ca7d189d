"""Convert all tensors of a model in memory, from Hugging Face's names to Megatron-Core's and back.

Rule: the tensors are exactly those of the configuration, with its shapes and one dtype; otherwise a
UserError lists the differences. Nothing is cast, padded, transposed or left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.families.family import LAYOUTS
from mixtrain.config.schema import Config
from mixtrain.errors import UserError
from mixtrain.interop.convert.hf_config import export_problems
from mixtrain.interop.convert.tensor_mapping import mapped_slices

DTYPES = (torch.float32, torch.bfloat16)  # of weights that mixtrain trains
SHOWN = 5  # problems of a kind; with a wrong size every tensor has one


def to_megatron(config: Config, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return new, unsharded Megatron tensors (tensor_schema.py) from those of either layout."""
    check_exportable(config)
    slices = list(mapped_slices(config, layout_of(config, tensors)))
    hf_shapes = {name: shape for part in slices for name, shape in part.hf_shapes().items()}
    check_tensors(hf_shapes, tensors)
    like = next(iter(tensors.values()))
    megatron = {key: like.new_empty(shape) for key, shape in tensor_schema.shapes(config).items()}
    for part in slices:
        part.fill_megatron(megatron[part.key][part.stack_index], tensors)
    return megatron


def to_hugging_face(
    config: Config, megatron: dict[str, torch.Tensor], layout: str = "hub"
) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors of unsharded Megatron tensors.

    They are views, except q, k and v with several query groups: these are copies.
    """
    check_exportable(config)
    check_tensors(tensor_schema.shapes(config), megatron)
    tensors: dict[str, torch.Tensor] = {}
    for part in mapped_slices(config, layout):
        tensors |= part.to_hugging_face(megatron[part.key][part.stack_index])
    return tensors


def check_exportable(config: Config) -> None:
    """UserError with every reason why transformers has no model that computes the same."""
    if problems := export_problems(config):
        raise UserError(*problems)


def layout_of(config: Config, names: Iterable[str]) -> str:
    """Return the layout of tensor names, `hub` or `fused`; UserError if both or neither."""
    given = set(names)
    all_names = {
        layout: {name for part in mapped_slices(config, layout) for name in part.names}
        for layout in LAYOUTS
    }
    common = set.intersection(*all_names.values())
    distinctive = {layout: sorted(given & all_names[layout] - common) for layout in LAYOUTS}
    hub, fused = (distinctive[layout] for layout in LAYOUTS)
    if hub and fused:
        raise UserError(
            f"two layouts at once: {hub[0]} (files) and {fused[0]} (transformers 5 in memory)"
        )
    if not hub and not fused:
        examples = " nor ".join(min(all_names[layout] - common) for layout in LAYOUTS)
        raise UserError(
            f"no router or expert of a Mixtral is among the {len(given)} tensors: neither"
            f" {examples}"
        )
    return "hub" if hub else "fused"


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any], dtypes=DTYPES, mixed=False
) -> None:
    """UserError unless the tensors have the names and shapes of `shapes` and one of `dtypes`.

    All must have the same dtype, unless `mixed`; then only the first one's is checked.
    """
    present = [name for name in shapes if name in tensors]
    dtype = tensors[present[0]].dtype if present else DTYPES[0]
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes]
    misshapen = [name for name in present if tuple(tensors[name].shape) != shapes[name]]
    problems = [
        *_first([f"{name} is missing, of shape {shapes[name]}" for name in missing]),
        *_first([f"{name} is not a tensor of this model" for name in unexpected]),
        *_first(
            [
                f"{name} has shape {tuple(tensors[name].shape)}; the configuration makes it"
                f" {shapes[name]}"
                for name in misshapen
            ]
        ),
    ]
    if dtype not in dtypes:
        problems.append(f"{present[0]} is {dtype}; weights are {' or '.join(map(str, dtypes))}")
    if not mixed:
        problems += _first(
            [
                f"{name} is {tensors[name].dtype}, but {present[0]} is {dtype}; all must be the"
                " same; --dtype fp32, bf16 or fp16 makes them so"
                for name in present
                if tensors[name].dtype != dtype
            ]
        )
    if problems:
        raise UserError(*problems)


def _first(problems: list[str]) -> list[str]:
    """Return the first SHOWN problems of a kind, and a line with how many more there are."""
    hidden = len(problems) - SHOWN
    return problems[:SHOWN] + ([f"... and {hidden} more such tensors"] if hidden > 0 else [])
