"""Context parallelism: which chunks of a sequence a rank holds.

Rule: rank r of n holds the chunks r and 2n-1-r of 2n, so that causal attention costs every rank the
same. Megatron-Core's rotary positions (and engine/compat/cpu.py's copy of that function) are split
in the same way.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Return the two of 2*size chunks that a rank holds, in its order."""
    return rank, 2 * size - 1 - rank


def local_part(sequence: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return a rank's chunks [batch, length/size] of full sequences [batch, length]."""
    if size == 1:
        return sequence
    chunks = sequence.chunk(2 * size, dim=1)
    return torch.cat([chunks[index] for index in chunks_of(rank, size)], dim=1)


def gather_in_order(part: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Gather every rank's part [length/size, ...] into the sequence [length, ...] in its order.

    Backward sums the gradient of the sequence over the ranks and returns each rank its part.
    """
    order = [index for rank in range(group.size()) for index in chunks_of(rank, group.size())]
    chunks = gather_from_sequence_parallel_region(part, group=group).chunk(len(order))
    return torch.cat([chunks[order.index(index)] for index in range(len(order))])
