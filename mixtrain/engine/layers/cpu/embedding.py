"""The embedding on the CPU: its gradient touches only the rows that were looked up."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from mixtrain.engine.layers.main_grad import buffer_of


class Lookup(torch.autograd.Function):
    """Embedding lookup: tokens [...], table [V, H] -> [..., H]."""

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, table)
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        tokens, table = ctx.saved_tensors
        buffer = buffer_of(table)
        if buffer is None:
            return None, torch.ops.aten.embedding_dense_backward(
                gradient, tokens, len(table), -1, False
            )
        buffer.index_add_(0, tokens.flatten(), gradient.flatten(0, -2).to(buffer.dtype))
        table.grad_added_to_main_grad = True
        return None, torch.empty_like(table)  # never read


def install(model: torch.nn.Module) -> None:
    """Replace the forward of `model`'s embedding by Lookup, unless tensor ranks split the table."""
    for module in model.modules():
        is_table = isinstance(module, VocabParallelEmbedding)
        if is_table and module.tp_group.size() == 1 and not module.reduce_scatter_embeddings:
            module.forward = partial(_forward, module)


def _forward(module: VocabParallelEmbedding, tokens: torch.Tensor) -> torch.Tensor:
    return Lookup.apply(tokens, module.weight)
