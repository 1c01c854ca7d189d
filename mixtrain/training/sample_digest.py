"""A digest of the samples that each logged step reads, the same at every layout.

Rule: an id identifies a sample, not when it was read (data/batches.py, sample_ids).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from mixtrain.data.batches import IDS

DIGITS = 16


class SampleIds:
    """The ids of the samples that this rank read in the current step."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []

    def watch(self, microbatches: Iterator[dict]) -> Iterator[dict]:
        """Yield the same microbatches and record the ids of each when it is read."""
        for microbatch in microbatches:
            self.ids.append(microbatch[IDS])
            yield microbatch

    def clear(self) -> None:
        self.ids = []

    def gather(self, device: torch.device) -> list[list[int]]:
        """Return the sorted ids that all ranks read in this step. Every rank must call.

        Ranks of a tensor-, pipeline- or context-parallel group read the same samples, data-parallel
        ranks different ones.
        """
        local_ids = torch.cat(self.ids).to(device)
        group = parallel_state.get_data_parallel_group()
        gathered = [torch.empty_like(local_ids) for _ in range(group.size())]
        torch.distributed.all_gather(gathered, local_ids, group=group)
        return sorted(torch.cat(gathered).tolist())


def digest(ids: list[list[int]]) -> str:
    """Return the first DIGITS hexadecimal digits of the SHA-256 of the ids."""
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:DIGITS]
