"""Context parallelism: which part of a sequence a rank holds.

Rule: rank r of n holds the chunks r and 2n-1-r of 2n, so that causal attention costs every rank the
same. Rotary positions in Megatron-Core (and engine/compat/cpu.py's copy of that function) are cut
the same way.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The chunks of 2*size that a rank holds, in the order in which it holds them."""
    return rank, 2 * size - 1 - rank


def local_part(sequence: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A rank's part [batch, length/size] of whole sequences [batch, length]."""
    if size == 1:
        return sequence
    parts = sequence.chunk(2 * size, dim=1)
    return torch.cat([parts[chunk] for chunk in chunks_of(rank, size)], dim=1)


def gather_in_order(part: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Every rank's part [length/size, ...] as the whole sequence [length, ...] in its order.

    The gradient of the whole is added up over the ranks, and each gets back that of its part.
    """
    held = [chunk for rank in range(group.size()) for chunk in chunks_of(rank, group.size())]
    pieces = gather_from_sequence_parallel_region(part, group=group).chunk(len(held))
    return torch.cat([pieces[held.index(chunk)] for chunk in range(len(held))])
