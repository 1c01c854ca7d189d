"""Matrix products on the CPU by oneDNN, where that is faster than PyTorch's choice.

PyTorch multiplies fp32 matrices on the CPU by MKL, which uses AVX-512 only on Intel's processors.
The oneDNN in PyTorch uses it on all: on an AMD EPYC of 2024 the products of a training step are 2.2
times as fast (docs/benchmarks.md). Without AVX-512, and for bf16, which already uses oneDNN,
PyTorch's choice stays; bf16 sums of many terms go by the transpose.

Rule: the same sums, in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

# multiplications from which oneDNN is faster: it builds a kernel for every new shape
WORTHWHILE = 3e7
WORTHWHILE_AGAIN = 1e6  # for the same few shapes
LONG = 16000  # terms of a sum (a vocabulary) from which a bf16 product is faster by its transpose


def product(a: torch.Tensor, b: torch.Tensor, again: bool = False) -> torch.Tensor:
    """Multiply [m, k] by [k, n], of any strides; `again`: the call has one of few shapes."""
    if _is_onednns(a, b, WORTHWHILE_AGAIN if again else WORTHWHILE):
        # the operator that torch.compile uses for a linear layer: a times b.t() transposed
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    if a.dtype is torch.bfloat16 and a.shape[1] >= LONG and a.device.type == "cpu":
        return (b.t() @ a.t()).t().contiguous()
    return a @ b


def _is_onednns(a: torch.Tensor, b: torch.Tensor, worthwhile: float = WORTHWHILE) -> bool:
    large = (
        a.dtype is torch.float32 and a.shape[0] * b.numel() >= worthwhile and a.device.type == "cpu"
    )
    return large and by_onednn() and _is_dense(a) and _is_dense(b)


def _is_dense(matrix: torch.Tensor) -> bool:
    """Whether it or its transpose is contiguous; oneDNN takes minutes for a slice of columns."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def by_onednn() -> bool:
    """Whether this machine multiplies large fp32 matrices by oneDNN."""
    is_enabled = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return is_enabled and torch.backends.cpu.get_cpu_capability() == "AVX512"


class Linear(torch.autograd.Function):
    """x times weight.t(): [..., in], [out, in] -> [..., out]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        to_x = product(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        to_weight = _weight_gradient(x.flatten(0, -2), rows) if ctx.needs_input_grad[1] else None
        return to_x, to_weight


def _weight_gradient(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[n, in], [n, out] -> [out, in].

    oneDNN computes the transpose, which is faster; in bf16 a transposed gradient is slow to
    accumulate.
    """
    return product(x.t(), rows).t() if _is_onednns(x.t(), rows) else rows.t() @ x


def install(model: torch.nn.Module) -> None:
    """Have Megatron-Core's linear layers multiply by Linear, unless tensor ranks communicate."""
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module._forward_impl = partial(_linear, module._forward_impl)


def _linear(
    upstream: Callable, input: torch.Tensor, weight: torch.Tensor, **options
) -> torch.Tensor:
    """Replace _forward_impl of ColumnParallelLinear and RowParallelLinear."""
    supported = {
        "gradient_accumulation_fusion": False,
        "allreduce_dgrad": False,
        "sequence_parallel": False,
    }
    is_supported = all(options[name] is value for name, value in supported.items())
    if options.get("grad_output_buffer") is None and is_supported:
        product = Linear.apply(input, weight)
        return product if options["bias"] is None else product + options["bias"]
    return upstream(input=input, weight=weight, **options)
