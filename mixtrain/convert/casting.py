"""Weights from one dtype to another, where that loses no more than digits."""

from __future__ import annotations

import torch

from mixtrain.errors import UserError

# --dtype
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`: itself, if it is. UserError if a number is too large for it."""
    if tensor.dtype is dtype:
        return tensor
    found = tensor.to(dtype)
    if dtype is torch.float16 and not found.isfinite().all() and tensor.isfinite().all():
        largest = tensor.abs().max().item()
        raise UserError(f"{name} has {largest:g}, and fp16 ends at {torch.finfo(dtype).max:g}: use bf16 or fp32")
    return found
