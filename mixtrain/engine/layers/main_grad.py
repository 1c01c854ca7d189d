"""Megatron-Core's gradient buffers, for layers of ours that add to them without a detour over autograd."""

from __future__ import annotations

import torch


def buffer_of(weight: torch.nn.Parameter) -> torch.Tensor | None:
    """Where the gradient of `weight` is added up.

    None: autograd must be given it. There is no such place, or a hook on the weight (put there
    between steps) reads it, or it meets another: Megatron-Core says zero_out_wgrad of a table that
    is the output layer's too.

    Whoever adds to it says so in weight.grad_added_to_main_grad, as Megatron-Core's own fused
    kernels do, and gives autograd a tensor that nobody reads.
    """
    readers = ("_backward_hooks", "_post_accumulate_grad_hooks", "zero_out_wgrad")
    return (
        None
        if any(getattr(weight, name, None) for name in readers)
        else getattr(weight, "main_grad", None)
    )
