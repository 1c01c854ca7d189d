"""Which samples a step has read: a digest for each logged step, the same at every layout.

Rule: an id says what was read and not when (data/batches.py, sample_ids).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from mixtrain.data.batches import IDS

DIGITS = 16


class SampleIds:
    """The ids of the samples that this rank has read in the running step."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []

    def watch(self, microbatches: Iterator[dict]) -> Iterator[dict]:
        """The same microbatches; each is entered when it is read."""
        for microbatch in microbatches:
            self.ids.append(microbatch[IDS])
            yield microbatch

    def clear(self) -> None:
        """Before a step."""
        self.ids = []

    def gather(self, device: torch.device) -> list[list[int]]:
        """The ids that all ranks have read in this step, in order. Every rank must call.

        The ranks of a tensor, pipeline or context parallel group read the same samples,
        data-parallel ones others.
        """
        mine = torch.cat(self.ids).to(device)
        group = parallel_state.get_data_parallel_group()
        every = [torch.empty_like(mine) for _ in range(group.size())]
        torch.distributed.all_gather(every, mine, group=group)
        return sorted(torch.cat(every).tolist())


def digest(ids: list[list[int]]) -> str:
    """A few digits of the SHA-256 of ids in order."""
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:DIGITS]
