"""Pad the vocabulary so that tensor parallelism divides it.

Rule: padding rows have the values of a new model; export and generation leave them out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mixtrain.config.plan import Plan
from mixtrain.engine import weight_init


def padded_size(size: int, divisible_by: int) -> int:
    """Round `size` up to a multiple of `divisible_by`."""
    return -(-size // divisible_by) * divisible_by


class VocabPadding(NamedTuple):
    """The rows of a plan's vocabulary from `hf_vocab_size` on."""

    plan: Plan
    hf_vocab_size: int

    def elements(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return elements start..stop of the flattened tensor `key`, all in padding rows."""
        model = self.plan.config.model
        shape = (model.vocab_size - self.hf_vocab_size, model.hidden_size)
        rows = weight_init.draw(self.plan, key, (), shape).flatten()
        first = self.hf_vocab_size * model.hidden_size
        return rows[start - first : stop - first]

    def notes(self) -> list[str]:
        """Return a note about the padding rows, if there are any."""
        size = self.plan.config.model.vocab_size
        added = size - self.hf_vocab_size
        if not added:
            return []
        return [
            f"model.vocab_size = {size}: {added} {'rows' if added > 1 else 'row'} with the initial"
            f" values of a new model follow the {self.hf_vocab_size} of config.json; they are in"
            " the softmax of the training loss, generation never chooses them, and an export"
            " leaves them out"
        ]
