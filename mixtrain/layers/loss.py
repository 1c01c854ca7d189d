"""The loss of each token where the vocabulary is whole on its rank: one tensor of logits, and no other of its size."""

from __future__ import annotations

import torch

ROWS = 64  # tokens whose logits go through all operations on the CPU while they are in its cache


class TokenLosses(torch.autograd.Function):
    """Cross entropy of fp32 logits [n, V] against labels [n] -> [n]. The logits are overwritten by their gradient.

    Megatron-Core's takes three tensors of the logits' size, for a vocabulary that is split over tensor ranks;
    PyTorch's takes four.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = logits.new_empty(len(logits), 1)
        rows = ROWS if logits.device.type == "cpu" else max(1, len(logits))
        for part, label, loss in zip(
            *(tensor.split(rows) for tensor in (logits, labels.unsqueeze(1), losses)), strict=True
        ):
            part.sub_(part.amax(dim=1, keepdim=True))
            of_label = part.gather(1, label)
            total = part.exp_().sum(dim=1, keepdim=True)
            loss.copy_(total.log() - of_label)
            part.div_(total)  # the softmax, which the gradient is but for the label's own place
            part.scatter_add_(1, label, part.new_full(label.shape, -1.0))
        ctx.gradient = logits.detach()  # not saved as an input: it is one no more
        return losses.squeeze(1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient.mul_(gradient.unsqueeze(1)), None


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[s, b, V], which are overwritten, [b, s] -> [b, s] in fp32."""
    losses = TokenLosses.apply(logits.flatten(0, 1).float(), labels.t().flatten())
    return losses.view(logits.shape[:2]).t().contiguous()
