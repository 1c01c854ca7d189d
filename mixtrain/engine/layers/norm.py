"""RMSNorm: PyTorch's fused kernel, or CpuNorm on the CPU; marked for sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019).

    x is [..., hidden_size]. Under sequence parallelism each tensor-parallel rank sees its part of
    the sequence, so the weight's gradient must be summed over these ranks. Megatron-Core does that
    for parameters marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return CpuNorm.apply(x, self.weight, self.eps) if self._is_cpu(x) else super().forward(x)

    @staticmethod
    def _is_cpu(x: torch.Tensor) -> bool:
        """Return whether to use CpuNorm: on the CPU PyTorch's kernel takes twice as long."""
        return x.device.type == "cpu"


class CpuNorm(torch.autograd.Function):
    """RMSNorm in fp32 that saves x and one number per row for backward.

    On the CPU PyTorch runs many operations and saves the result of each.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul(scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        given = gradient.float()
        to_weight = (given * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        given = given * weight
        along = (given * normed).mean(dim=-1, keepdim=True)
        to_x = given.addcmul_(normed, along, value=-1).mul_(scale)
        return to_x.to(x.dtype), to_weight, None


class ProjectionNorm(torch.nn.Module):
    """RMSNorm over a token's whole query (or key) projection, as OLMoE has it (Muennighoff 2024).

    x [s, b, heads / TP, head_dim] -> the same shape. The mean of squares is over all `heads`, on
    every tensor-parallel rank: the ranks add up their sums. The weight [heads / TP * head_dim] is
    split along the heads, as the projection is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        heads: int,
        eps: float = 1e-5,
        **_: object,
    ):
        super().__init__()
        self.eps = eps
        self.width = heads * hidden_size
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        weight = torch.ones(self.width // ranks, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.flatten(-2).float()
        squares = wide.square().sum(dim=-1, keepdim=True)
        # forward: the sum over ranks; backward: the ranks' gradients of that sum, added up
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares)
        )
        normed = (wide * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)
        return (self.weight * normed).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The weight, split along axis 0 over tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
