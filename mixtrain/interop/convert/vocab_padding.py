"""Rows that a vocabulary has beside a model's own, so that tensor parallelism can divide it.

Rule: they are what a new model begins with, and everybody who gives a model away leaves them out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mixtrain.config.plan import Plan
from mixtrain.engine import weight_init


def padded(size: int, divisible_by: int) -> int:
    """The least multiple that is as large."""
    return -(-size // divisible_by) * divisible_by


class Padding(NamedTuple):
    """The rows of a plan's vocabulary from `vocabulary` on."""

    plan: Plan
    vocabulary: int

    def part(self, key: str, start: int, stop: int) -> torch.Tensor:
        """The elements start..stop of the flat tensor `key`, all of them of these rows: as a new model has them."""
        model = self.plan.config.model
        rows = weight_init.draw(
            self.plan, key, (), (model.vocab_size - self.vocabulary, model.hidden_size)
        ).flatten()
        first = self.vocabulary * model.hidden_size
        return rows[start - first : stop - first]

    def notes(self) -> list[str]:
        """What is to be said of them: nothing, if there are none."""
        size = self.plan.config.model.vocab_size
        if size == self.vocabulary:
            return []
        added = size - self.vocabulary
        return [
            f"model.vocab_size = {size}: {added} {'rows' if added > 1 else 'row'} as a new model"
            f" has them, beside the {self.vocabulary} of config.json; they are in the softmax of"
            " the training loss, generation never chooses them, and an export leaves them out"
        ]
