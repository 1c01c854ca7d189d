"""The loss of each token where the vocabulary is whole on its rank: one tensor of logits, and no other of its size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Tokens whose logits are in fp32 at a time: on the CPU as many as its cache holds, on a GPU as many
# as keep it busy.
ROWS = {"cpu": 64, "cuda": 4096}


class TokenLosses(torch.autograd.Function):
    """Cross entropy in fp32 of logits [n, V] against labels [n] -> [n]. The logits are overwritten by their gradient.

    Megatron-Core's takes three fp32 tensors of the logits' size, for a vocabulary that is split over tensor ranks;
    PyTorch's takes four.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
        for part, label, loss in _parts(logits, labels.unsqueeze(1), losses):
            highest = part.amax(dim=1, keepdim=True).float()
            of_label = part.gather(1, label).float()
            softmax = torch.softmax(part, dim=1, dtype=torch.float32)
            # the highest score's softmax is one over the sum of all exponentials less the highest
            loss.copy_(highest - of_label - softmax.amax(dim=1, keepdim=True).log())
            softmax.scatter_add_(1, label, softmax.new_full(label.shape, -1.0))  # the gradient
            part.copy_(softmax)
        ctx.gradient = logits.detach()  # not saved as an input: it is one no more
        return losses.squeeze(1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        for part, scale in _parts(ctx.gradient, gradient.unsqueeze(1)):
            part.copy_(part.float().mul_(scale))
        return ctx.gradient, None


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(ROWS[tensor.device.type]) for tensor in tensors), strict=True)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[s, b, V], which are overwritten, [b, s] -> [b, s] in fp32."""
    losses = TokenLosses.apply(logits.flatten(0, 1), labels.t().flatten())
    return losses.view(logits.shape[:2]).t().contiguous()
