"""Which Hugging Face tensors make up which part of which Megatron-Core tensor: one table, read in both directions.

Rule: a row says how a Megatron tensor is cut into views that have the Hugging Face tensors' numbers in their order. One
way writes into these views, the other reads them: the two directions cannot disagree, and neither copies twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.families import family_of
from mixtrain.config.schema import Config


class Heads(NamedTuple):
    """What linear_qkv is cut by: key/value groups, the query heads of each, the size of a head."""

    groups: int
    queries: int
    size: int
    vocabulary: int | None = None  # rows of the embedding that are the model's; None: all


def split_whole(tensor: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    return [tensor]


def split_rows(tensor: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    """[V, H] without the rows that were added to V to be divisible, which Hugging Face's tensor has not."""
    return [tensor[: heads.vocabulary]]


def split_gate_up(tensor: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    """[2F, H]: gate, up."""
    return list(tensor.chunk(2))


def split_qkv(tensor: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    """[groups * (queries + 2) * size, H], a group: queries, key, value. Gives [groups, queries or 1, size, H]."""
    by_group = tensor.view(heads.groups, heads.queries + 2, heads.size, *tensor.shape[1:])
    return list(by_group.split([heads.queries, 1, 1], dim=1))


# Each gives views, in the order of the row's names. The axes that a view has more than the tensor,
# its first ones, are one in Hugging Face's.
SPLITS = {"whole": split_whole, "rows": split_rows, "gate_up": split_gate_up, "qkv": split_qkv}


class Piece(NamedTuple):
    """The part [numbers] of the Megatron tensor `key`: it is made of the Hugging Face tensors `names`, and they of it.

    Each can be converted alone: a converter needs the memory of the largest, not of the model.
    """

    key: str
    numbers: tuple[int, ...]  # the layer, the expert: what the names have, and may be none
    shape: tuple[int, ...]  # of the part
    names: tuple[str, ...]
    split: str
    heads: Heads

    def views(self, part: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> a view of a contiguous Megatron part, with the numbers of that Hugging Face tensor in their order."""
        return dict(zip(self.names, SPLITS[self.split](part, self.heads), strict=True))

    def write(self, part: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Fill a Megatron part from the Hugging Face tensors."""
        for name, view in self.views(part).items():
            view.copy_(tensors[name].view(view.shape))

    def read(self, part: torch.Tensor) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors of a Megatron part: views of it, but for q, k and v of several groups."""
        return {
            name: view.flatten(0, view.dim() - part.dim())
            for name, view in self.views(part).items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the Hugging Face tensors."""
        return {
            name: tuple(view.shape)
            for name, view in self.read(torch.empty(self.shape, device="meta")).items()
        }


def pieces(config: Config, layout: str, vocabulary: int | None = None) -> Iterator[Piece]:
    """Every part of every Megatron tensor of a resolved Config, in the order in which the model uses the tensors.

    `vocabulary`: how many rows of the vocabulary Hugging Face's tensors have, if not all.
    """
    model = config.model
    shapes = tensor_schema.shapes(config)
    family = family_of(config)
    table = family.rows(layout)
    heads = Heads(
        model.num_query_groups,
        model.num_attention_heads // model.num_query_groups,
        model.kv_channels,
        vocabulary,
    )
    if uncovered := [key for key in shapes if key not in table]:
        raise RuntimeError(
            f"no row of mixtrain/config/families/{family.model_type}.py covers {', '.join(uncovered)}"
        )
    if spare := [
        key for key in table if key not in shapes and tensor_schema.condition(key) != "untied"
    ]:
        raise RuntimeError(
            f"rows of mixtrain/config/families/{family.model_type}.py are of no tensor: {', '.join(spare)}"
        )
    for key in shapes:
        templates = table[key].names.split()
        axes = templates[0].count("{")
        for numbers in product(*map(range, shapes[key][:axes])):
            named = dict(zip(("layer", "expert"), numbers, strict=False))
            names = tuple(template.format(**named) for template in templates)
            yield Piece(key, numbers, shapes[key][axes:], names, table[key].split, heads)
