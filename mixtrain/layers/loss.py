"""The loss of each token where the vocabulary is whole on its rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in fp32: [s, b, V], [b, s] -> [b, s].

    PyTorch's own, one pass for the softmax and one for its gradient; Megatron-Core's, for a vocabulary that is split
    over tensor ranks, makes eight.
    """
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.t().flatten(), reduction="none")
    return flat.view(logits.shape[:2]).t().contiguous()
