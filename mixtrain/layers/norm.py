"""The norm: PyTorch's fused RMSNorm, with the mark that sequence parallelism needs."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of [..., hidden_size] (Zhang and Sennrich 2019).

    Under sequence parallelism each tensor-parallel rank sees its part of the sequence, so the weight's gradient must be
    added up over these ranks; Megatron-Core does so for parameters that are marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
