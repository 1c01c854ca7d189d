"""Choose the next token from the logits of one position.

Rule: each token takes one draw from its prompt's own random stream, and the rounding of another
layout moves no boundary between tokens by more than itself: the same seed gives the same text at
every layout.
"""

from __future__ import annotations

import hashlib

import torch

from mixtrain.interop.generate.request import Sampling


def random_stream(seed: int, prompt: int) -> torch.Generator:
    """Return the random generator of prompt number `prompt`; other prompts do not affect it."""
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def choose_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token id for the logits [vocabulary] of its position."""
    logits = logits[: sampling.vocabulary]
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.double().cpu() / sampling.temperature
    probabilities = truncated_softmax(scaled, sampling.top_k, sampling.top_p)
    # in the order of token ids: sorted by probability, two almost equal tokens could swap places
    # between layouts
    boundaries = probabilities.cumsum(0)
    draw = torch.rand((), dtype=torch.float64, generator=generator) * boundaries[-1]
    last_possible = int(probabilities.nonzero()[-1])
    return int(torch.searchsorted(boundaries, draw, right=True).clamp(max=last_possible))


def truncated_softmax(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Return the softmax of logits [vocabulary], 0 for tokens outside top-k and then top-p."""
    order = logits.argsort(descending=True, stable=True)
    if top_k is not None:
        order = order[:top_k]
    probabilities = logits[order].softmax(0)
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        order = order[before < top_p]  # a prefix, because `before` increases
        probabilities = probabilities[: len(order)]
    return torch.zeros_like(logits).scatter(0, order, probabilities / probabilities.sum())
