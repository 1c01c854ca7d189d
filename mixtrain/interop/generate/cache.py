"""A key-value cache for mixtrain's layers: a forward pass over tokens in a row, each of any sequence.

Rule: the tokens of a pass stand one after another along Megatron-Core's sequence axis, with a batch of one. Nothing
else in the model looks from one token to another, so that prompts of unequal length need no padding between them, and
sequence parallelism splits the row as it splits a sequence in training.

Legend of shapes: T tokens of a pass, b sequences, h query heads here, g key/value heads here, d head size, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)

from mixtrain.engine.layers.attention import CoreAttention


@dataclass
class Row:
    """The tokens of a forward pass: those of each sequence in turn, then some that belong to none."""

    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], in their sequences
    lengths: list[int]  # tokens of each sequence; only 1, or all of a prompt

    @staticmethod
    def of(
        sequences: list[list[int]], starts: list[int], multiple: int, device: torch.device
    ) -> Row:
        """The tokens of sequences from their position `starts` on, filled up to a multiple that is not zero."""
        tokens = [token for sequence in sequences for token in sequence]
        positions = [
            start + number
            for start, part in zip(starts, sequences, strict=True)
            for number in range(len(part))
        ]
        filling = [0] * (-len(tokens) % multiple if tokens else multiple)
        row = torch.tensor([tokens + filling, positions + filling], device=device)
        return Row(row[0], row[1], [len(part) for part in sequences])

    @property
    def is_decoding(self) -> bool:
        """Every sequence has one token: its latest."""
        return all(length == 1 for length in self.lengths)

    def last(self, multiple: int) -> torch.Tensor:
        """Where the last token of each sequence stands, filled up to a multiple that is not zero."""
        ends = torch.tensor(self.lengths, dtype=torch.long).cumsum(0) - 1
        filling = -len(ends) % multiple if len(ends) else multiple
        return F.pad(ends, (0, filling)).to(self.tokens.device)


class CachedAttention(torch.nn.Module):
    """Core attention that keeps the keys and values of the sequences, and attends with new tokens alone."""

    def __init__(self, core: CoreAttention, cache: Cache):
        super().__init__()
        self.scale = core.softmax_scale
        self.cache = cache
        self.keys = self.values = torch.empty(0)  # [b, g, L, d]

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        """[T, 1, h, d], [T, 1, g, d], [T, 1, g, d] -> [T, 1, h*d]."""
        row = self.cache.row
        if self.keys.numel() == 0:
            shape = (self.cache.sequences, key.shape[2], self.cache.length, key.shape[3])
            self.keys = key.new_zeros(shape)
            self.values = value.new_zeros(shape)
        parts = (tensor[:, 0] for tensor in (query, key, value))
        attended = query.new_zeros(len(query), 1, query.shape[2] * query.shape[3])
        used = self._latest(row, *parts) if row.is_decoding else self._prompts(row, *parts)
        attended[: len(used), 0] = used
        return attended

    def _prompts(
        self, row: Row, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Whole prompts, each attending to itself: no token of another is touched, and no mask is made."""
        found = []
        start = 0
        for sequence, length in enumerate(row.lengths):
            here = slice(start, start := start + length)
            q, k, v = (tensor[here].transpose(0, 1) for tensor in (query, key, value))
            self.keys[sequence, :, :length] = k
            self.values[sequence, :, :length] = v
            found.append(
                self._attend(q[None], k[None], v[None], is_causal=True)[0]
                .transpose(0, 1)
                .flatten(1)
            )
        return torch.cat(found)

    def _latest(
        self, row: Row, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """The latest token of each sequence, attending to all before it."""
        number = len(row.lengths)
        positions = row.positions[:number]
        each = torch.arange(number, device=positions.device)
        self.keys[each, :, positions] = key[:number]
        self.values[each, :, positions] = value[:number]
        longest = int(positions.max()) + 1 if number else 0
        seen = torch.arange(longest, device=positions.device) <= positions[:, None]
        attended = self._attend(
            query[:number, :, None], self.keys[:, :, :longest], self.values[:, :, :longest],
            attn_mask=seen[:, None, None],
        )  # fmt: skip
        return attended.flatten(1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **mask
    ) -> torch.Tensor:
        if not query.numel():
            return query
        return F.scaled_dot_product_attention(
            query, key, value, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1], **mask
        )


class Rotation(torch.nn.Module):
    """Stands in for Megatron-Core's rotary embedding, and gives the angles of the positions of the running pass."""

    def __init__(self, rotary: torch.nn.Module, cache: Cache):
        super().__init__()
        self.rotary = rotary
        self.cache = cache

    def get_rotary_seq_len(self, *_: object, **__: object) -> int:
        return len(self.cache.row.positions)

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        """[T, 1, 1, d]."""
        return self.rotary(self.cache.length)[self.cache.row.positions]


class Cache:
    """The cache of a model chunk: what the running pass is about, and the layers' keys and values."""

    def __init__(self, model: torch.nn.Module):
        """`model` is the GPTModel itself; from now on it answers for the tokens of `row`, and gives the logits of the
        last token of each sequence alone."""
        # fmt: skip
        self.sequence_parallel = model.config.sequence_parallel
        self.tensor_ranks = model.config.tensor_model_parallel_size
        self.row: Row | None = None
        self.sequences = self.length = 0
        self.layers: list[CachedAttention] = []
        for layer in model.decoder.layers:
            attention = layer.self_attention
            attention.core_attention = CachedAttention(attention.core_attention, self)
            self.layers.append(attention.core_attention)
        model.rotary_pos_emb = Rotation(model.rotary_pos_emb, self)
        if model.post_process:
            model.output_layer.register_forward_pre_hook(self._last_rows)

    def begin(self, sequences: int, length: int) -> None:
        """Forget everything: from here on so many sequences, none with more positions than `length`."""
        self.sequences = sequences
        self.length = length
        for layer in self.layers:
            layer.keys = layer.values = torch.empty(0)

    def keep(self, sequences: list[int]) -> None:
        """Go on with some of the sequences, in this order."""
        self.sequences = len(sequences)
        for layer in self.layers:
            layer.keys = layer.keys[sequences]
            layer.values = layer.values[sequences]

    def _last_rows(self, _: torch.nn.Module, arguments: tuple) -> tuple:
        """Before the output layer: of a prompt's tokens only the last one's logits are wanted."""
        hidden, *others = arguments
        if self.row.is_decoding:
            return arguments
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        hidden = hidden[self.row.last(self.tensor_ranks)]
        return (
            scatter_to_sequence_parallel_region(hidden) if self.sequence_parallel else hidden,
            *others,
        )
