"""A key-value cache for mixtrain's layers: one forward pass over packed tokens of many sequences.

Rule: the tokens of a pass are packed along Megatron-Core's sequence axis, with a batch size of 1.
Only attention mixes tokens, so prompts of unequal length need no padding, and sequence parallelism
splits the packed tokens as it splits a sequence in training.

Shapes: T tokens of a pass, b sequences, h query heads and g key/value heads of this rank, d head
size, L positions.
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
class PackedTokens:
    """The tokens of a forward pass: those of each sequence in turn, then padding."""

    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], in their sequences
    lengths: list[int]  # tokens of each sequence: all 1, or whole prompts

    @staticmethod
    def pack(
        sequences: list[list[int]], starts: list[int], multiple: int, device: torch.device
    ) -> PackedTokens:
        """Pack tokens whose positions begin at `starts`; pad to a positive multiple."""
        tokens = [token for sequence in sequences for token in sequence]
        positions = [
            start + offset
            for start, sequence in zip(starts, sequences, strict=True)
            for offset in range(len(sequence))
        ]
        padding = [0] * (-len(tokens) % multiple if tokens else multiple)
        packed = torch.tensor([tokens + padding, positions + padding], device=device)
        return PackedTokens(packed[0], packed[1], [len(sequence) for sequence in sequences])

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence has one token, its latest."""
        return all(length == 1 for length in self.lengths)

    def last_indices(self, multiple: int) -> torch.Tensor:
        """Return the index of each sequence's last token, padded to a positive multiple."""
        last = torch.tensor(self.lengths, dtype=torch.long).cumsum(0) - 1
        padding = -len(last) % multiple if len(last) else multiple
        return F.pad(last, (0, padding)).to(self.tokens.device)


class CachedAttention(torch.nn.Module):
    """Core attention that keeps keys and values, and computes attention for new tokens only."""

    def __init__(self, core: CoreAttention, cache: KVCache):
        super().__init__()
        self.scale = core.softmax_scale
        self.cache = cache
        self.keys = self.values = torch.empty(0)  # [b, g, L, d]

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        """[T, 1, h, d], [T, 1, g, d], [T, 1, g, d] -> [T, 1, h*d]."""
        packed = self.cache.packed
        if self.keys.numel() == 0:
            shape = (self.cache.num_sequences, key.shape[2], self.cache.max_length, key.shape[3])
            self.keys = key.new_zeros(shape)
            self.values = value.new_zeros(shape)
        qkv = (tensor[:, 0] for tensor in (query, key, value))
        attend = self._attend_latest if packed.is_decoding else self._attend_prompts
        attended = attend(packed, *qkv)
        output = query.new_zeros(len(query), 1, query.shape[2] * query.shape[3])
        output[: len(attended), 0] = attended  # the rest is padding
        return output

    def _attend_prompts(
        self, packed: PackedTokens, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend within each prompt, one after another, without a mask between prompts."""
        outputs = []
        start = 0
        for sequence, length in enumerate(packed.lengths):
            stop = start + length
            q, k, v = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
            self.keys[sequence, :, :length] = k
            self.values[sequence, :, :length] = v
            attended = self._attend(q[None], k[None], v[None], is_causal=True)[0]
            outputs.append(attended.transpose(0, 1).flatten(1))
            start = stop
        return torch.cat(outputs)

    def _attend_latest(
        self, packed: PackedTokens, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend from the latest token of each sequence to itself and the tokens before it."""
        count = len(packed.lengths)
        positions = packed.positions[:count]
        sequences = torch.arange(count, device=positions.device)
        self.keys[sequences, :, positions] = key[:count]
        self.values[sequences, :, positions] = value[:count]
        longest = int(positions.max()) + 1 if count else 0
        visible = torch.arange(longest, device=positions.device) <= positions[:, None]
        keys = self.keys[:, :, :longest]
        values = self.values[:, :, :longest]
        mask = visible[:, None, None]
        return self._attend(query[:count, :, None], keys, values, attn_mask=mask).flatten(1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **mask
    ) -> torch.Tensor:
        if not query.numel():
            return query
        return F.scaled_dot_product_attention(
            query, key, value, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1], **mask
        )


class PackedRotaryEmbedding(torch.nn.Module):
    """Replace Megatron-Core's rotary embedding: return the angles of the packed tokens."""

    def __init__(self, rotary: torch.nn.Module, cache: KVCache):
        super().__init__()
        self.rotary = rotary
        self.cache = cache

    def get_rotary_seq_len(self, *_: object, **__: object) -> int:
        return len(self.cache.packed.positions)

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        """Return [T, 1, 1, d]."""
        return self.rotary(self.cache.max_length)[self.cache.packed.positions]


class KVCache:
    """The packed tokens of the running pass, and the keys and values of a model chunk's layers."""

    def __init__(self, model: torch.nn.Module):
        """Change a GPTModel in place so that it runs on `packed`.

        It then returns the logits of each sequence's last token only.
        """
        self.sequence_parallel = model.config.sequence_parallel
        self.tensor_parallel_size = model.config.tensor_model_parallel_size
        self.packed: PackedTokens | None = None
        self.num_sequences = self.max_length = 0
        self.layers: list[CachedAttention] = []
        for layer in model.decoder.layers:
            attention = layer.self_attention
            attention.core_attention = CachedAttention(attention.core_attention, self)
            self.layers.append(attention.core_attention)
        model.rotary_pos_emb = PackedRotaryEmbedding(model.rotary_pos_emb, self)
        if model.post_process:
            model.output_layer.register_forward_pre_hook(self._select_last_tokens)

    def reset(self, num_sequences: int, max_length: int) -> None:
        """Empty the cache for new sequences of at most `max_length` positions."""
        self.num_sequences = num_sequences
        self.max_length = max_length
        for layer in self.layers:
            layer.keys = layer.values = torch.empty(0)

    def keep(self, sequences: list[int]) -> None:
        """Keep the sequences with these indices, in this order."""
        self.num_sequences = len(sequences)
        for layer in self.layers:
            layer.keys = layer.keys[sequences]
            layer.values = layer.values[sequences]

    def _select_last_tokens(self, _: torch.nn.Module, arguments: tuple) -> tuple:
        """Before the output layer, select the last token of each prompt."""
        hidden, *rest = arguments
        if self.packed.is_decoding:
            return arguments
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        hidden = hidden[self.packed.last_indices(self.tensor_parallel_size)]
        if self.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        return (hidden, *rest)
