"""Which token comes next, from the logits of one position.

Rule: a token takes one draw from its prompt's own random stream, and rounding in another layout's
logits moves no boundary by more than itself: the same seed gives the same text at every layout.
"""

from __future__ import annotations

import hashlib

import torch

from mixtrain.interop.generate.request import Sampling


def stream(seed: int, prompt: int) -> torch.Generator:
    """The random stream of the prompt with this number: other prompts beside it change nothing."""
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id, given the logits [vocabulary] of its position."""
    logits = logits[: sampling.vocabulary]
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = kept(
        logits.double().cpu() / sampling.temperature, sampling.top_k, sampling.top_p
    )
    # in the order of the vocabulary: by size, two tokens as good as equal would change places from
    # layout to layout
    ends = probabilities.cumsum(0)
    draw = torch.rand((), dtype=torch.float64, generator=generator) * ends[-1]
    return int(
        torch.searchsorted(ends, draw, right=True).clamp(max=int(probabilities.nonzero()[-1]))
    )


def kept(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """The softmax of [vocabulary] logits, 0 for what top-k and then top-p leave out."""
    order = logits.argsort(descending=True, stable=True)
    if top_k is not None:
        order = order[:top_k]
    likeliest = logits[order].softmax(0)
    if top_p is not None:
        before = likeliest.cumsum(0) - likeliest
        order = order[before < top_p]
        likeliest = likeliest[: len(order)]  # `before` rises, so that the first are kept
    return torch.zeros_like(logits).scatter(0, order, likeliest / likeliest.sum())
