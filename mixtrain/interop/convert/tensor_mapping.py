"""Map Megatron-Core tensors to Hugging Face tensors: a family's table, used in both directions.

Rule: a row says how to split a Megatron tensor into views whose elements are in the order of the
Hugging Face tensors. Import writes into these views and export reads them, so the two directions
cannot disagree and neither copies twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.families import family_of
from mixtrain.config.schema import Config


class SplitSizes(NamedTuple):
    """The sizes that the functions in SPLITS need."""

    query_groups: int
    queries_per_group: int
    head_dim: int
    hf_vocab_size: int | None = None  # rows of the embedding without padding; None: all rows


def split_none(tensor: torch.Tensor, sizes: SplitSizes) -> list[torch.Tensor]:
    return [tensor]


def split_vocab_rows(tensor: torch.Tensor, sizes: SplitSizes) -> list[torch.Tensor]:
    """[V, H] without the padding rows, which the Hugging Face tensor does not have."""
    return [tensor[: sizes.hf_vocab_size]]


def split_gate_up(tensor: torch.Tensor, sizes: SplitSizes) -> list[torch.Tensor]:
    """[2F, H] as gate and up, [F, H] each."""
    return list(tensor.chunk(2))


def split_qkv(tensor: torch.Tensor, sizes: SplitSizes) -> list[torch.Tensor]:
    """[groups * (queries + 2) * head_dim, H] as q, k, v: [groups, queries or 1, head_dim, H] each.

    A group is its queries, then its key, then its value.
    """
    groups, queries, head_dim, _ = sizes
    by_group = tensor.view(groups, queries + 2, head_dim, *tensor.shape[1:])
    return list(by_group.split([queries, 1, 1], dim=1))


# Each function returns views in the order of the row's names. Where a view has more axes than the
# tensor, its leading axes are one axis of the Hugging Face tensor.
SPLITS = {
    "none": split_none,
    "vocab_rows": split_vocab_rows,
    "gate_up": split_gate_up,
    "qkv": split_qkv,
}


class MappedSlice(NamedTuple):
    """The slice [stack_index] of the Megatron tensor `key`: exactly the tensors `names`.

    Each slice converts alone: a converter needs memory for the largest slice, not for the model.
    """

    key: str
    stack_index: tuple[int, ...]  # (), (layer,) or (layer, expert): the placeholders of the names
    shape: tuple[int, ...]
    names: tuple[str, ...]
    split: str
    sizes: SplitSizes

    def views(self, megatron: torch.Tensor) -> dict[str, torch.Tensor]:
        """Hugging Face name -> view of a contiguous Megatron slice, elements in the same order."""
        return dict(zip(self.names, SPLITS[self.split](megatron, self.sizes), strict=True))

    def fill_megatron(self, megatron: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Write the Hugging Face tensors into a Megatron slice."""
        for name, view in self.views(megatron).items():
            view.copy_(tensors[name].view(view.shape))

    def to_hugging_face(self, megatron: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> Hugging Face tensor of a Megatron slice.

        Views, except q, k and v with several query groups: these are copies.
        """
        return {
            name: view.flatten(0, view.dim() - megatron.dim())
            for name, view in self.views(megatron).items()
        }

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the Hugging Face tensors."""
        tensors = self.to_hugging_face(torch.empty(self.shape, device="meta"))
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def mapped_slices(
    config: Config, layout: str, hf_vocab_size: int | None = None
) -> Iterator[MappedSlice]:
    """Yield every slice of every Megatron tensor, in the order of tensor_schema.TENSORS.

    `config` is resolved. `hf_vocab_size`: rows of the Hugging Face embedding, if the Megatron one
    is padded. RuntimeError if the table and config/tensor_schema.py do not have the same keys.
    """
    model = config.model
    shapes = tensor_schema.shapes(config)
    family = family_of(config)
    rows = family.tensor_mapping(layout)
    sizes = SplitSizes(
        model.num_query_groups,
        model.num_attention_heads // model.num_query_groups,
        model.kv_channels,
        hf_vocab_size,
    )
    table = f"mixtrain/config/families/{family.model_type}.py"
    if unmapped := [key for key in shapes if key not in rows]:
        raise RuntimeError(f"no row of {table} covers {', '.join(unmapped)}")
    # a tied model has no output layer
    optional = {key for key in rows if tensor_schema.condition(key) == "untied"}
    if unused := [key for key in rows if key not in shapes and key not in optional]:
        raise RuntimeError(f"rows of {table} match no tensor of the model: {', '.join(unused)}")
    for key, shape in shapes.items():
        templates = rows[key].names.split()
        axes = templates[0].count("{")
        for stack_index in product(*map(range, shape[:axes])):
            placeholders = dict(zip(("layer", "expert"), stack_index, strict=False))
            names = tuple(template.format(**placeholders) for template in templates)
            yield MappedSlice(key, stack_index, shape[axes:], names, rows[key].split, sizes)
