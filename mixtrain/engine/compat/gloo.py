"""Collectives of gloo, where it has none of its own or a slow one.

Rule: sums are taken in a fixed order, so that a step gives the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# numbers that a rank receives at a time to add them up: memory for all would be new in every step
PIECE = 1 << 22


class Done:
    """What an asynchronous collective returns where everything has been done already."""

    def wait(self) -> None: ...


def all_gather(
    output: torch.Tensor, input_: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """torch.distributed.all_gather_into_tensor. gloo's copies in and out and takes four times as long.

    Where a part lies in its place in the output already, nothing of it is copied.
    """
    if async_op and _size(group) > 1:
        return dist.all_gather_into_tensor(output, input_, group=group, async_op=True)
    parts = output.view(_size(group), -1)
    own = input_.contiguous().view(-1)
    mine = parts[_rank(group)]
    if mine.data_ptr() != own.data_ptr():
        mine.copy_(own)
    _exchange(group, lambda other: own, parts.__getitem__)
    return Done() if async_op else None


def reduce_scatter(
    output: torch.Tensor,
    input_: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """torch.distributed.reduce_scatter_tensor of a sum. gloo's adds up all parts on all ranks."""
    if op != dist.ReduceOp.SUM or (async_op and _size(group) > 1):
        return dist.reduce_scatter_tensor(output, input_, op=op, group=group, async_op=async_op)
    parts = input_.contiguous().view(_size(group), -1)
    own = output.view(-1)
    rank = _rank(group)
    if own.data_ptr() != parts[rank].data_ptr():
        own.copy_(parts[rank])
    others = [other for other in range(len(parts)) if other != rank]
    received = {other: own.new_empty(min(PIECE, len(own))) for other in others}
    for start in range(0, len(own), PIECE):
        mine = own[start : start + PIECE]
        piece = slice(start, start + PIECE)
        _exchange(
            group,
            lambda other, piece=piece: parts[other, piece],
            lambda other, mine=mine: received[other][: len(mine)],
        )
        for other in others:
            mine.add_(received[other][: len(mine)])
    return Done() if async_op else None


def _exchange(
    group: Any, give: Callable[[int], torch.Tensor], take: Callable[[int], torch.Tensor]
) -> None:
    """Each rank of the group sends every other one a tensor, and receives one."""
    others = [other for other in range(_size(group)) if other != _rank(group)]
    world = [dist.get_global_rank(group, other) if group else other for other in others]
    work = [dist.irecv(take(other), peer, group) for other, peer in zip(others, world, strict=True)]
    work += [
        dist.isend(give(other), peer, group) for other, peer in zip(others, world, strict=True)
    ]
    for one in work:
        one.wait()


def _size(group: Any) -> int:
    return dist.get_world_size(group)


def _rank(group: Any) -> int:
    return dist.get_rank(group)


def gather_uneven(
    input_: torch.Tensor,
    group: Any,
    output_split_sizes: Any = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Upstream gathers parts of unequal length with all_gather, which gloo refuses; its all-to-all takes them."""
    if group.size() == 1:
        return input_
    sizes = [int(size) for size in output_split_sizes or [len(input_)] * group.size()]
    output = input_.new_empty(sum(sizes), *input_.shape[1:])
    given = torch.cat([input_] * group.size())
    dist.all_to_all_single(output, given, sizes, [len(input_)] * group.size(), group=group)
    return output


def reduce_scatter_uneven(
    input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """The same for the way back: every rank's contribution to this rank's part, added up in the order of ranks."""
    if group.size() == 1:
        return input_
    sizes = [
        int(size) for size in input_split_sizes or [len(input_) // group.size()] * group.size()
    ]
    mine = sizes[group.rank()]
    output = input_.new_empty(group.size() * mine, *input_.shape[1:])
    dist.all_to_all_single(output, input_.contiguous(), [mine] * group.size(), sizes, group=group)
    return output.view(group.size(), mine, *input_.shape[1:]).sum(dim=0)
