"""Core attention, whole sequences or context parallel: PyTorch's kernels, on the CPU products by blocks.

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

KERNELS = {  # model.attention_backend; Megatron-Core calls cuDNN's kernel fused
    AttnBackend.flash: SDPBackend.FLASH_ATTENTION,
    AttnBackend.fused: SDPBackend.CUDNN_ATTENTION,
    AttnBackend.unfused: SDPBackend.MATH,
}


class CoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v, each query seeing the keys up to its own position.

    Keys and values are not repeated for the query heads that share them. Under context parallelism
    each rank gathers the keys and values of the whole sequence and attends with its own two chunks
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
            key, value = gather_in_order(torch.stack([key, value], dim=1), self.cp_group).unbind(
                dim=1
            )
            length = query.shape[0] // 2  # of a chunk
            ends = [
                (chunk + 1) * length
                for chunk in chunks_of(self.cp_group.rank(), self.cp_group.size())
            ]
            attended = torch.cat(
                [
                    self._attend(part, key[:end], value[:end])
                    for part, end in zip(query.chunk(2), ends, strict=True)
                ]
            )
        return attended.flatten(2)

    @staticmethod
    def _is_cpu(query: torch.Tensor) -> bool:
        """There PyTorch's kernel takes 1.3 to 3 times as long as products of blocks do (measured with AVX-512)."""
        return query.device.type == "cpu"

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The queries are the last positions of the keys. [s, b, h, d], [>=s, b, g, d] twice -> [s, b, h, d]."""
        forced = KERNELS.get(self.config.attention_backend)
        if forced is None and self._is_cpu(query):
            return BlockAttention.apply(
                query, key, value, self.softmax_scale or query.shape[3] ** -0.5
            )
        with sdpa_kernel(forced) if forced else contextlib.nullcontext():
            attended = F.scaled_dot_product_attention(
                *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
                **_causal(query, key, aligned=forced in (None, SDPBackend.FLASH_ATTENTION)),
            )
        return attended.permute(2, 0, 1, 3)


def _causal(query: torch.Tensor, key: torch.Tensor, aligned: bool) -> dict[str, object]:
    """The causal mask, without a tensor wherever the kernel knows how; `aligned`: flash attention may be taken."""
    rows = query.shape[0]
    columns = key.shape[0]
    if rows == columns:
        return {"is_causal": True}
    if aligned and query.is_cuda and query.dtype is torch.bfloat16:
        return {"attn_mask": _lower_right(rows, columns)}
    return {
        "attn_mask": torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(
            columns - rows
        )
    }


def _lower_right(rows: int, columns: int) -> CausalBias:
    """PyTorch's causal_lower_right without the tensor of [2, rows, columns] that its constructor allocates."""
    bias = torch.Tensor.__new__(CausalBias)
    bias.__init__(CausalVariant.LOWER_RIGHT, rows, columns)
    return bias
