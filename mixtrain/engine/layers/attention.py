"""Core attention, with or without context parallelism: PyTorch's kernels, BlockAttention on CPU.

Legend of shapes: s length on this rank, b batch, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, CausalVariant

from mixtrain.engine.layers.context import chunks_of, gather_in_order
from mixtrain.engine.layers.cpu.attention import BlockAttention

KERNELS = {  # by model.attention_backend; "fused" is Megatron-Core's name for cuDNN's kernel
    AttnBackend.flash: SDPBackend.FLASH_ATTENTION,
    AttnBackend.fused: SDPBackend.CUDNN_ATTENTION,
    AttnBackend.unfused: SDPBackend.MATH,
}


class CoreAttention(MegatronModule):
    """Causal attention: softmax(q k^T / sqrt(d)) v.

    Keys and values are not repeated for the query heads that share them. Under context parallelism
    each rank gathers the keys and values of the full sequence and attends with its own two chunks
    of queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection=None,
        **_: object,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = (
            getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()
        )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        """[s, b, h, d], [s, b, g, d], [s, b, g, d] -> [s, b, h*d]."""
        if self.cp_group.size() == 1:
            attended = self._attend(query, key, value)
        else:
            stacked = gather_in_order(torch.stack([key, value], dim=1), self.cp_group)
            key, value = stacked.unbind(dim=1)
            length = query.shape[0] // 2  # of a chunk
            chunks = chunks_of(self.cp_group.rank(), self.cp_group.size())
            ends = [(index + 1) * length for index in chunks]
            attended = torch.cat(
                [
                    self._attend(chunk, key[:end], value[:end])
                    for chunk, end in zip(query.chunk(2), ends, strict=True)
                ]
            )
        return attended.flatten(2)

    @staticmethod
    def _is_cpu(query: torch.Tensor) -> bool:
        """Return whether to use BlockAttention.

        On the CPU PyTorch's kernel takes 1.3 to 3 times as long (measured with AVX-512).
        """
        return query.device.type == "cpu"

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[s, b, h, d], 2 x [n, b, g, d] -> [s, b, h, d]; queries are the last s of n positions."""
        forced = KERNELS.get(self.config.attention_backend)
        if forced is None and self._is_cpu(query):
            scale = self.softmax_scale or query.shape[3] ** -0.5
            return BlockAttention.apply(query, key, value, scale)
        with sdpa_kernel(forced) if forced else contextlib.nullcontext():
            attended = F.scaled_dot_product_attention(
                *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
                **_causal(query, key, aligned=forced in (None, SDPBackend.FLASH_ATTENTION)),
            )
        return attended.permute(2, 0, 1, 3)


def _causal(query: torch.Tensor, key: torch.Tensor, aligned: bool) -> dict[str, object]:
    """Return the arguments for a causal mask, without a mask tensor if the kernel can do without.

    `aligned`: flash attention, which aligns the mask to the last key, may run.
    """
    rows = query.shape[0]
    columns = key.shape[0]
    if rows == columns:
        return {"is_causal": True}
    if aligned and query.is_cuda and query.dtype is torch.bfloat16:
        return {"attn_mask": _lower_right(rows, columns)}
    visible = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
    return {"attn_mask": visible.tril(columns - rows)}


def _lower_right(rows: int, columns: int) -> CausalBias:
    """Return PyTorch's causal_lower_right without allocating its [2, rows, columns] tensor."""
    bias = torch.Tensor.__new__(CausalBias)
    bias.__init__(CausalVariant.LOWER_RIGHT, rows, columns)
    return bias
