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
from mixtrain.config.schema import Config
from mixtrain.interop.convert import hf_config
from mixtrain.interop.convert.hf_config import Architecture


class Row(NamedTuple):
    """The Megatron tensor `key` (config/tensor_schema.py), cut as CUTS says into the Hugging Face tensors `names`.

    A {layer} or {expert} in the names is an axis of the Megatron tensor, in this order.
    """

    key: str
    cut: str
    names: str


MEGATRON = tensor_schema.LAYER
LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
MOE = LAYER + "block_sparse_moe."

# fmt: off The names in files: those on the hub, of transformers 4, and of transformers 5 unless
# told otherwise.
HUB = [
    Row(*row)
    for row in [
        ("embedding.word_embeddings.weight", "rows", "model.embed_tokens.weight"),
        (
            MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
            "whole",
            LAYER + "input_layernorm.weight",
        ),
        (
            MEGATRON + "self_attention.linear_qkv.weight",
            "qkv",
            f"{ATTENTION}q_proj.weight {ATTENTION}k_proj.weight {ATTENTION}v_proj.weight",
        ),  # noqa: E501
        (MEGATRON + "self_attention.linear_proj.weight", "whole", ATTENTION + "o_proj.weight"),
        (MEGATRON + "pre_mlp_layernorm.weight", "whole", LAYER + "post_attention_layernorm.weight"),
        (MEGATRON + "mlp.router.weight", "whole", MOE + "gate.weight"),
        (
            MEGATRON + "mlp.experts.experts.linear_fc1.weight",
            "gate_up",
            f"{MOE}experts.{{expert}}.w1.weight {MOE}experts.{{expert}}.w3.weight",
        ),  # noqa: E501
        (
            MEGATRON + "mlp.experts.experts.linear_fc2.weight",
            "whole",
            MOE + "experts.{expert}.w2.weight",
        ),
        ("decoder.final_layernorm.weight", "whole", "model.norm.weight"),
        ("output_layer.weight", "rows", "lm_head.weight"),
    ]
]
# What is another in transformers 5's memory, and in files that it saves with
# save_original_format=False.
FUSED = [
    Row(*row)
    for row in [
        (MEGATRON + "mlp.router.weight", "whole", LAYER + "mlp.gate.weight"),
        (
            MEGATRON + "mlp.experts.experts.linear_fc1.weight",
            "whole",
            LAYER + "mlp.experts.gate_up_proj",
        ),
        (
            MEGATRON + "mlp.experts.experts.linear_fc2.weight",
            "whole",
            LAYER + "mlp.experts.down_proj",
        ),
    ]
]
# What is another, or more, in the files of Qwen3-MoE. In memory it is called as Mixtral is.
QWEN3_MOE = [
    Row(*row)
    for row in [
        (MEGATRON + "self_attention.q_layernorm.weight", "whole", ATTENTION + "q_norm.weight"),
        (MEGATRON + "self_attention.k_layernorm.weight", "whole", ATTENTION + "k_norm.weight"),
        (MEGATRON + "mlp.router.weight", "whole", LAYER + "mlp.gate.weight"),
        (
            MEGATRON + "mlp.experts.experts.linear_fc1.weight",
            "gate_up",
            f"{LAYER}mlp.experts.{{expert}}.gate_proj.weight"
            f" {LAYER}mlp.experts.{{expert}}.up_proj.weight",
        ),  # noqa: E501
        (
            MEGATRON + "mlp.experts.experts.linear_fc2.weight",
            "whole",
            LAYER + "mlp.experts.{expert}.down_proj.weight",
        ),  # noqa: E501
    ]
]
# fmt: on
LAYOUTS = ("hub", "fused")


class Heads(NamedTuple):
    """What linear_qkv is cut by: key/value groups, the query heads of each, the size of a head."""

    groups: int
    queries: int
    size: int
    vocabulary: int | None = None  # rows of the embedding that are the model's; None: all


def cut_whole(tensor: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    return [tensor]


def cut_rows(tensor: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    """[V, H] without the rows that were added to V to be divisible, which Hugging Face's tensor has not."""
    return [tensor[: heads.vocabulary]]


def cut_gate_up(tensor: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    """[2F, H]: gate, up."""
    return list(tensor.chunk(2))


def cut_qkv(tensor: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    """[groups * (queries + 2) * size, H], a group: queries, key, value. Gives [groups, queries or 1, size, H]."""
    by_group = tensor.view(heads.groups, heads.queries + 2, heads.size, *tensor.shape[1:])
    return list(by_group.split([heads.queries, 1, 1], dim=1))


# Each gives views, in the order of the row's names. The axes that a view has more than the tensor,
# its first ones, are one in Hugging Face's.
CUTS = {"whole": cut_whole, "rows": cut_rows, "gate_up": cut_gate_up, "qkv": cut_qkv}


class Piece(NamedTuple):
    """The part [numbers] of the Megatron tensor `key`: it is made of the Hugging Face tensors `names`, and they of it.

    Each can be converted alone: a converter needs the memory of the largest, not of the model.
    """

    key: str
    numbers: tuple[int, ...]  # the layer, the expert: what the names have, and may be none
    shape: tuple[int, ...]  # of the part
    names: tuple[str, ...]
    cut: str
    heads: Heads

    def views(self, part: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> a view of a contiguous Megatron part, with the numbers of that Hugging Face tensor in their order."""
        return dict(zip(self.names, CUTS[self.cut](part, self.heads), strict=True))

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


def rows(architecture: Architecture, layout: str) -> dict[str, Row]:
    """Key -> row of a model's tensors in a layout, `hub` or `fused`."""
    table = {row.key: row for row in HUB}
    if architecture is hf_config.QWEN3_MOE:
        table |= {row.key: row for row in QWEN3_MOE}
    return table | {"hub": {}, "fused": {row.key: row for row in FUSED}}[layout]


def pieces(config: Config, layout: str, vocabulary: int | None = None) -> Iterator[Piece]:
    """Every part of every Megatron tensor of a resolved Config, in the order in which the model uses the tensors.

    `vocabulary`: how many rows of the vocabulary Hugging Face's tensors have, if not all.
    """
    model = config.model
    shapes = tensor_schema.shapes(config)
    table = rows(hf_config.architecture_of(config), layout)
    heads = Heads(
        model.num_query_groups,
        model.num_attention_heads // model.num_query_groups,
        model.kv_channels,
        vocabulary,
    )
    if uncovered := [key for key in shapes if key not in table]:
        raise RuntimeError(
            f"no row of mixtrain/interop/convert/tensor_mapping.py covers {', '.join(uncovered)}"
        )
    if spare := [
        key for key in table if key not in shapes and tensor_schema.condition(key) != "untied"
    ]:
        raise RuntimeError(
            f"rows of mixtrain/interop/convert/tensor_mapping.py are of no tensor: {', '.join(spare)}"
        )
    for key in shapes:
        templates = table[key].names.split()
        axes = templates[0].count("{")
        for numbers in product(*map(range, shapes[key][:axes])):
            named = dict(zip(("layer", "expert"), numbers, strict=False))
            names = tuple(template.format(**named) for template in templates)
            yield Piece(key, numbers, shapes[key][axes:], names, table[key].cut, heads)
