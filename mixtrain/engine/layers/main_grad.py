"""Megatron-Core's gradient buffers, for layers that add to them directly, not through autograd."""

from __future__ import annotations

import torch


def buffer_of(weight: torch.nn.Parameter) -> torch.Tensor | None:
    """Return the buffer that accumulates the gradient of `weight`, or None.

    None: autograd must get the gradient. Either there is no buffer, or a hook on the weight reads
    the gradient (hooks may be added between steps), or the table is also the output layer's, which
    Megatron-Core marks with zero_out_wgrad.

    A caller that adds to the buffer sets weight.grad_added_to_main_grad, as Megatron-Core's fused
    kernels do, and returns a tensor to autograd that is never read.
    """
    readers = ("_backward_hooks", "_post_accumulate_grad_hooks", "zero_out_wgrad")
    if any(getattr(weight, name, None) for name in readers):
        return None
    return getattr(weight, "main_grad", None)
