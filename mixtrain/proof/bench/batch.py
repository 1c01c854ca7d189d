"""The batch that every variant of a row trains on: random tokens from the seed, none masked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mixtrain.config.plan import Plan
from mixtrain.data.batches import IDS


def microbatches(plan: Plan, rank: int = 0, size: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the microbatches of data-parallel rank `rank` of `size`.

    All ranks together have the same global batch at every size.
    """
    trainer = plan.config.trainer
    length = plan.config.data.seq_length
    generator = torch.Generator().manual_seed(plan.config.seed)
    shape = (trainer.global_batch_size, length + 1)
    tokens = torch.randint(0, plan.config.model.vocab_size, shape, generator=generator)
    for rows in tokens[rank::size].split(trainer.micro_batch_size):
        yield {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "loss_mask": torch.ones(len(rows), length),
            "position_ids": torch.arange(length).repeat(len(rows), 1),
            IDS: torch.zeros(len(rows), dtype=torch.int64),
        }
