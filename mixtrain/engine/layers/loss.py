"""The loss of each token, for an unsplit vocabulary: no second tensor of the logits' size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# tokens whose logits are in fp32 at a time: what fits a CPU's cache, what keeps a GPU busy
ROWS = {"cpu": 64, "cuda": 4096}


class TokenLosses(torch.autograd.Function):
    """Cross entropy in fp32: logits [n, V], labels [n] -> [n].

    Overwrites the logits with their gradient. Megatron-Core's, for a vocabulary split over tensor
    ranks, takes three fp32 tensors of the logits' size; PyTorch's takes four.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
        for part, label, loss in _parts(logits, labels.unsqueeze(1), losses):
            highest = part.amax(dim=1, keepdim=True).float()
            of_label = part.gather(1, label).float()
            softmax = torch.softmax(part, dim=1, dtype=torch.float32)
            # the highest logit's softmax is 1 / sum(exp(logits - highest))
            loss.copy_(highest - of_label - softmax.amax(dim=1, keepdim=True).log())
            softmax.scatter_add_(1, label, softmax.new_full(label.shape, -1.0))  # the gradient
            part.copy_(softmax)
        ctx.gradient = logits.detach()  # not save_for_backward: the input has been overwritten
        return losses.squeeze(1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        for part, scale in _parts(ctx.gradient, gradient.unsqueeze(1)):
            part.copy_(part.float().mul_(scale))
        return ctx.gradient, None


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(ROWS[tensor.device.type]) for tensor in tensors), strict=True)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits [s, b, V], which are overwritten, labels [b, s] -> losses [b, s] in fp32."""
    losses = TokenLosses.apply(logits.flatten(0, 1), labels.t().flatten())
    return losses.view(logits.shape[:2]).t().contiguous()
