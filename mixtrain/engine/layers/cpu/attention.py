"""Causal attention on the CPU as matrix products over blocks of queries, forward and backward.

Rule: the formula of layers/attention.py. Scores and softmax are in fp32; attention weights and the
gradient of the scores are multiplied in the precision of the run, as in PyTorch's own kernel.

Legend of shapes: s queries, n >= s keys (the queries are the last positions), b batch, h query
heads, g key/value heads, d head size; r = h / g query heads share a key/value head: a group of s *
r rows.
"""

from __future__ import annotations

from functools import partial

import torch

from mixtrain.engine.layers.cpu import onednn_matmul

ROWS = 512  # of a block: large enough for an efficient product, and its scores fit a cache

_product = partial(onednn_matmul.product, again=True)


class BlockAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v: [s, b, h, d], [n, b, g, d] twice, scale -> [s, b, h, d].

    Saves only its inputs and recomputes the attention weights in backward.
    """

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        q, k, v = (_by_group(tensor, key.shape[2]) for tensor in (query, key, value))
        scaled = q.float() * scale
        wide = k.float()
        attended = torch.empty_like(q)
        blocks = _blocks(query, key)
        for group in range(len(k)):
            for rows, seen, hidden in blocks:
                weights = _softmax(scaled[group, rows], wide[group, :seen], hidden).to(v.dtype)
                attended[group, rows] = _product(weights, v[group, :seen])
        return _from_groups(attended, query.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        q, k, v, g = (_by_group(tensor, key.shape[2]) for tensor in (query, key, value, gradient))
        scaled = q.float() * ctx.scale
        wide_k = k.float()
        wide_v = v.float()
        wide_g = g.float() * ctx.scale
        to_q = torch.empty_like(q)
        to_k = torch.zeros_like(wide_k)
        to_v = torch.zeros_like(wide_v)
        blocks = _blocks(query, key)
        for group in range(len(k)):
            for rows, seen, hidden in blocks:
                weights = _softmax(scaled[group, rows], wide_k[group, :seen], hidden)
                to_v[group, :seen].add_(_product(weights.to(v.dtype).t(), g[group, rows]))
                to_weights = _product(wide_g[group, rows], wide_v[group, :seen].t())
                to_scores = torch._softmax_backward_data(to_weights, weights, 1, torch.float32).to(
                    q.dtype
                )
                to_q[group, rows] = _product(to_scores, k[group, :seen])
                to_k[group, :seen].add_(_product(to_scores.t(), q[group, rows]))
        pairs = ((to_q, query), (to_k, key), (to_v, value))
        return *(_from_groups(grad.to(like.dtype), like.shape) for grad, like in pairs), None


def _by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[s, b, h, d] -> [b * g, s * r, d]."""
    split = tensor.unflatten(2, (groups, -1))
    grouped = split.permute(1, 2, 0, 3, 4).contiguous()
    return grouped.view(-1, len(tensor) * split.shape[3], tensor.shape[3])


def _from_groups(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[b * g, s * r, d] -> `shape`, which is [s, b, h, d]."""
    length, batch, heads, size = shape
    groups = len(rows) // batch
    return (
        rows.view(batch, groups, length, heads // groups, size)
        .permute(2, 0, 1, 3, 4)
        .reshape(shape)
    )


def _blocks(query: torch.Tensor, key: torch.Tensor) -> list[tuple[slice, int, torch.Tensor]]:
    """Return for each block: rows of a group, number of visible keys, mask.

    The mask [rows, m] is -inf where a row does not see one of the block's last m keys, and 0
    elsewhere.
    """
    heads = query.shape[2] // key.shape[2]
    length = max(1, ROWS // heads)
    after = torch.full((length, length), -torch.inf).triu_(1).repeat_interleave(heads, dim=0)
    blocks = []
    for start in range(0, len(query), length):
        end = min(start + length, len(query))
        rows = slice(start * heads, end * heads)
        seen = len(key) - len(query) + end
        blocks.append((rows, seen, after[: (end - start) * heads, : end - start]))
    return blocks


def _softmax(q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Scaled queries [rows, d], keys [m, d], mask of the last keys -> weights [rows, m]."""
    scores = _product(q, k.t())
    scores[:, -hidden.shape[1] :].add_(hidden)
    return torch.softmax(scores, dim=1)
