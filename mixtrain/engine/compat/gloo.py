"""Collectives that gloo lacks, or has only in a slow form.

Rule: sums are taken in a fixed order, so that a rerun of a step is bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# elements that a rank receives at a time to add them up: a buffer for all would be allocated in
# every step
CHUNK = 1 << 22


class Done:
    """The handle of an asynchronous collective that is already done."""

    def wait(self) -> None: ...


def all_gather(
    output: torch.Tensor, input_: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Replace all_gather_into_tensor; gloo's copies in and out and takes four times as long.

    An input that is already a view of its place in the output is not copied.
    """
    if async_op and _size(group) > 1:
        return dist.all_gather_into_tensor(output, input_, group=group, async_op=True)
    shards = output.view(_size(group), -1)
    local = input_.contiguous().view(-1)
    local_output = shards[_rank(group)]
    if local_output.data_ptr() != local.data_ptr():
        local_output.copy_(local)
    _exchange(group, lambda peer: local, shards.__getitem__)
    return Done() if async_op else None


def reduce_scatter(
    output: torch.Tensor,
    input_: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Replace reduce_scatter_tensor of a sum; gloo's adds up all shards on all ranks."""
    if op != dist.ReduceOp.SUM or (async_op and _size(group) > 1):
        return dist.reduce_scatter_tensor(output, input_, op=op, group=group, async_op=async_op)
    shards = input_.contiguous().view(_size(group), -1)
    total = output.view(-1)
    rank = _rank(group)
    if total.data_ptr() != shards[rank].data_ptr():
        total.copy_(shards[rank])
    peers = _peers(group)
    received = {peer: total.new_empty(min(CHUNK, len(total))) for peer in peers}
    for start in range(0, len(total), CHUNK):
        chunk = total[start : start + CHUNK]
        span = slice(start, start + CHUNK)
        _exchange(
            group,
            lambda peer, span=span: shards[peer, span],
            lambda peer, chunk=chunk: received[peer][: len(chunk)],
        )
        for peer in peers:
            chunk.add_(received[peer][: len(chunk)])
    return Done() if async_op else None


def _exchange(
    group: Any, sent: Callable[[int], torch.Tensor], received: Callable[[int], torch.Tensor]
) -> None:
    """Send `sent(peer)` to every other rank of the group and receive `received(peer)` from it."""
    peers = [(peer, dist.get_global_rank(group, peer) if group else peer) for peer in _peers(group)]
    work = [dist.irecv(received(peer), rank, group) for peer, rank in peers]
    work += [dist.isend(sent(peer), rank, group) for peer, rank in peers]
    for handle in work:
        handle.wait()


def _peers(group: Any) -> list[int]:
    """Return the other ranks of the group, by their rank in it."""
    return [peer for peer in range(_size(group)) if peer != _rank(group)]


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
    """Gather shards of unequal length with all-to-all.

    Upstream uses all_gather, which gloo refuses for unequal lengths.
    """
    if group.size() == 1:
        return input_
    sizes = [int(size) for size in output_split_sizes or [len(input_)] * group.size()]
    output = input_.new_empty(sum(sizes), *input_.shape[1:])
    sent = torch.cat([input_] * group.size())
    dist.all_to_all_single(output, sent, sizes, [len(input_)] * group.size(), group=group)
    return output


def reduce_scatter_uneven(
    input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """Reverse gather_uneven: sum every rank's values for this rank's shard, in rank order."""
    if group.size() == 1:
        return input_
    sizes = [
        int(size) for size in input_split_sizes or [len(input_) // group.size()] * group.size()
    ]
    local_size = sizes[group.rank()]
    output = input_.new_empty(group.size() * local_size, *input_.shape[1:])
    dist.all_to_all_single(
        output, input_.contiguous(), [local_size] * group.size(), sizes, group=group
    )
    return output.view(group.size(), local_size, *input_.shape[1:]).sum(dim=0)
