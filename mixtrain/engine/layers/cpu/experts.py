"""The experts of a layer on the CPU: one expert at a time, so that its data stays in the cache.

Rule: the formula of layers/experts.py, with the router's weight applied after the second matrix.
There each operation runs on all rows; on the CPU memory bandwidth is the limit, so all operations
run on the rows of one expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixtrain.engine.layers.cpu.onednn_matmul import product
from mixtrain.engine.layers.main_grad import buffer_of


class ExpertByExpert(torch.autograd.Function):
    """[T, H] sorted by expert, router weights [T], [E, 2F, H], [E, H, F], rows of each -> [T, H].

    The router's weight multiplies an expert's result: H numbers per token instead of F. Saves gate,
    up and result of every token for backward and recomputes the rest.
    """

    @staticmethod
    def forward(ctx, tokens, probs, weight1, weight2, counts: list[int]) -> torch.Tensor:
        results = torch.empty_like(tokens)
        hiddens = []
        parts = zip(tokens.split(counts), results.split(counts), weight1, weight2, strict=True)
        for x, result, w1, w2 in parts:
            hidden = product(x, w1.t())
            result.copy_(product(swiglu(hidden), w2.t()))
            hiddens.append(hidden)
        ctx.save_for_backward(tokens, probs, results, weight1, weight2, *hiddens)
        ctx.counts = counts
        return results.mul(probs[:, None]).to(tokens.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, probs, results, weight1, weight2, *hiddens = ctx.saved_tensors
        to_probs = gradient.to(probs.dtype).mul(results).sum(dim=1)
        weighted = gradient.mul(probs[:, None]).to(gradient.dtype)
        to_tokens = torch.empty_like(tokens)
        to_weight1 = WeightGradient(weight1)
        to_weight2 = WeightGradient(weight2)
        rows = [tensor.split(ctx.counts) for tensor in (weighted, tokens, to_tokens)]
        for expert, (g, x, to_x, hidden, w1, w2) in enumerate(
            zip(*rows, hiddens, weight1, weight2, strict=True)
        ):
            activated, to_hidden = swiglu_backward(hidden, product(g, w2))
            to_weight2.add(expert, product(g.t(), activated))
            to_weight1.add(expert, product(to_hidden.t(), x))
            to_x.copy_(product(to_hidden, w1))
        return to_tokens, to_probs, to_weight1.result(), to_weight2.result(), None


class WeightGradient:
    """The gradient of a weight [E, ...], in Megatron-Core's buffer if there is one."""

    def __init__(self, weight: torch.nn.Parameter):
        self.weight = weight
        self.gradient = torch.empty_like(weight)
        self.buffer = buffer_of(weight)

    def add(self, expert: int, gradient: torch.Tensor) -> None:
        if self.buffer is None:
            self.gradient[expert] = gradient
        else:
            self.buffer[expert].add_(gradient)

    def result(self) -> torch.Tensor:
        """Return the gradient for autograd, which is never read if a buffer has it."""
        if self.buffer is not None:
            self.weight.grad_added_to_main_grad = True
        return self.gradient


def swiglu(hidden: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [t, 2F] -> [t, F]."""
    gate, up = hidden.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def swiglu_backward(
    hidden: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (swiglu(hidden), the gradient of hidden); overwrites `gradient`."""
    gate, up = hidden.chunk(2, dim=1)
    to_hidden = torch.empty_like(hidden)
    to_gate, to_up = to_hidden.chunk(2, dim=1)
    silu = F.silu(gate)
    torch.mul(gradient, silu, out=to_up)
    torch.ops.aten.silu_backward(gradient.mul_(up), gate, grad_input=to_gate)
    return silu.mul_(up), to_hidden
