"""Matrix products of the CPU: oneDNN's where they are faster than those that PyTorch takes.

PyTorch multiplies fp32 matrices on the CPU by MKL, which leaves AVX-512 to Intel's processors; the
oneDNN that PyTorch carries takes it wherever it is: on an AMD EPYC of 2024 the products of a
training step are 2.2 times as fast (docs/benchmarks.md). Elsewhere, and for bf16, which goes
through oneDNN already, PyTorch's own choice stays; but for sums of many terms. Rule: the same sums,
in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

# Multiplications below which preparing oneDNN's kernel, which is made anew for every shape, costs
# more than it saves; and where the same few shapes come again and again.
WORTHWHILE = 3e7
WORTHWHILE_AGAIN = 1e6
# Terms of a sum, as many as a vocabulary has words, from which on a bf16 product is quicker by its
# transpose.
LONG = 16000


def product(a: torch.Tensor, b: torch.Tensor, again: bool = False) -> torch.Tensor:
    """[m, k] times [k, n], both of any strides; `again`: of one of few shapes."""
    if _is_onednns(a, b, WORTHWHILE_AGAIN if again else WORTHWHILE):
        # the operator that torch.compile puts in the place of a linear layer: a times a transposed
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    if a.dtype is torch.bfloat16 and a.shape[1] >= LONG and a.device.type == "cpu":
        return (b.t() @ a.t()).t().contiguous()
    return a @ b


def _is_onednns(a: torch.Tensor, b: torch.Tensor, worthwhile: float = WORTHWHILE) -> bool:
    large = (
        a.dtype is torch.float32 and a.shape[0] * b.numel() >= worthwhile and a.device.type == "cpu"
    )
    return large and by_onednn() and _is_whole(a) and _is_whole(b)


def _is_whole(matrix: torch.Tensor) -> bool:
    """Whether it lies in one piece. oneDNN's products of some columns of a wider matrix take minutes."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def by_onednn() -> bool:
    """Whether large fp32 products are oneDNN's on this machine."""
    has_it = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return has_it and torch.backends.cpu.get_cpu_capability() == "AVX512"


class Linear(torch.autograd.Function):
    """x times the transposed weight: [..., in], [out, in] -> [..., out]."""

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
    """[n, in], [n, out] -> [out, in]. By oneDNN its transpose, which is quicker; in bf16 that is slow to add up."""
    return product(x.t(), rows).t() if _is_onednns(x.t(), rows) else rows.t() @ x


def install(model: torch.nn.Module) -> None:
    """From now on Megatron-Core's linear layers in `model` take Linear where no tensor ranks exchange anything."""
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module._forward_impl = partial(_linear, module._forward_impl)


def _linear(
    upstream: Callable, input: torch.Tensor, weight: torch.Tensor, **options
) -> torch.Tensor:
    """Stands in for the method of both layers that multiplies."""
    plain = {
        "gradient_accumulation_fusion": False,
        "allreduce_dgrad": False,
        "sequence_parallel": False,
    }
    if options.get("grad_output_buffer") is None and all(
        options[name] is value for name, value in plain.items()
    ):
        product = Linear.apply(input, weight)
        return product if options["bias"] is None else product + options["bias"]
    return upstream(input=input, weight=weight, **options)
