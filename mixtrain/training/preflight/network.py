"""The wires between the ranks: a small all-reduce and all-to-all in every parallel group, right and how fast.

Rule: what comes back is held against what it must be, and every wait has an end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import Fault
from mixtrain.system.rank_identity import node_name

# of the tensor: large enough for the wire to count and not the start
BYTES = {"cpu": 2**20, "cuda": 2**26}
REPEATS = 3  # the best counts: the first one opens connections
PATIENCE = timedelta(seconds=60)
GB = 1e9
SLOW = 0.5  # of the median of the groups of a kind: worth a warning

# fmt: off
GROUPS: dict[str, Callable[[], ProcessGroup]] = {
    "all": lambda: torch.distributed.group.WORLD,
    "TP":  parallel_state.get_tensor_model_parallel_group,
    "CP":  parallel_state.get_context_parallel_group,
    "PP":  parallel_state.get_pipeline_model_parallel_group,
    "DP":  lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "EP":  parallel_state.get_expert_model_parallel_group,
    "ETP": parallel_state.get_expert_tensor_parallel_group,
    "EDP": parallel_state.get_expert_data_parallel_group,
}
# fmt: on


class Speed(NamedTuple):
    """Of one rank in one of its groups: bus bandwidth in GB/s as NVIDIA's nccl-tests define it."""

    kind: str
    members: list[int]  # ranks
    all_reduce: float
    all_to_all: float


def device_facts(ranks: Ranks) -> dict:
    """What there is to say of this rank's GPU, by the names of Facts."""
    if ranks.device.type != "cuda":
        return {"gpus": 0, "gpu_name": "", "gpu_memory": 0, "gpu_free": 0}
    free, total = torch.cuda.mem_get_info(ranks.device)
    name = torch.cuda.get_device_name(ranks.device)
    return {
        "gpus": torch.cuda.device_count(),
        "gpu_name": name,
        "gpu_memory": total,
        "gpu_free": free,
    }


def measure(ranks: Ranks) -> list[Speed]:
    """This rank's groups of more than one rank. Every rank must call. A Fault names the group and this node."""
    found = []
    for kind, group_of in GROUPS.items():
        group = group_of()
        if group.size() > 1:
            found.append(
                Speed(
                    kind,
                    torch.distributed.get_process_group_ranks(group),
                    *_speeds(ranks, kind, group),
                )
            )
    return found


def _speeds(ranks: Ranks, kind: str, group: ProcessGroup) -> tuple[float, float]:
    size = group.size()
    mine = group.rank()
    count = max(1, BYTES[ranks.device.type] // 4 // size) * size
    ones = torch.full((count,), mine + 1.0, device=ranks.device)
    # to the j-th rank goes mine * size + j, so that from the i-th comes i * size + mine
    parts = (
        (mine * size + torch.arange(size, device=ranks.device))
        .float()
        .repeat_interleave(count // size)
    )
    total = torch.empty_like(ones)
    received = torch.empty_like(parts)

    def all_reduce():
        total.copy_(ones)
        return torch.distributed.all_reduce(total, group=group, async_op=True)

    def all_to_all():
        return torch.distributed.all_to_all_single(received, parts, group=group, async_op=True)

    seconds = [
        _best(ranks, kind, name, work)
        for name, work in (("all-reduce", all_reduce), ("all-to-all", all_to_all))
    ]
    expected = (
        (torch.arange(size, device=ranks.device) * size + mine)
        .float()
        .repeat_interleave(count // size)
    )
    for name, result, right in (
        ("all-reduce", total, size * (size + 1) / 2),
        ("all-to-all", received, expected),
    ):
        if wrong := int((result != right).sum()):
            raise Fault(
                f"node {node_name()}: the {name} of the {kind} group gave {wrong} wrong numbers of"
                f" {count}"
            )
    share = (size - 1) / size * 4 * count / GB
    return 2 * share / seconds[0], share / seconds[1]


def _best(ranks: Ranks, kind: str, name: str, work: Callable) -> float:
    """Seconds of the quickest of REPEATS + 1 calls."""
    taken = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        try:
            work().wait(PATIENCE)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize(ranks.device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise Fault(
                f"node {node_name()}: the {name} of the {kind} group has failed: {reason}"
            ) from error
        taken.append(time.perf_counter() - started)
    return max(min(taken), 1e-9)


class Row(NamedTuple):
    """All groups of a kind: the slowest and the median rank, and the nodes of the slowest group."""

    kind: str
    ranks: int
    groups: int
    all_reduce: tuple[float, float]
    all_to_all: tuple[float, float]
    slowest: list[str]

    @property
    def is_uneven(self) -> bool:
        return self.groups > 1 and any(
            slow < SLOW * middle for slow, middle in (self.all_reduce, self.all_to_all)
        )


def rows(speeds: list[list[Speed]], nodes: list[str]) -> list[Row]:
    """The table of what all ranks have measured, `nodes` being the ranks' nodes."""
    table = []
    for kind in GROUPS:
        of_kind = [speed for rank in speeds for speed in rank if speed.kind == kind]
        if not of_kind:
            continue
        slowest = min(of_kind, key=lambda speed: speed.all_reduce)
        figures = [
            (min(values), median(values))
            for values in ([s.all_reduce for s in of_kind], [s.all_to_all for s in of_kind])
        ]
        where = list(dict.fromkeys(nodes[rank] for rank in slowest.members))
        groups = len({tuple(speed.members) for speed in of_kind})
        table.append(Row(kind, len(slowest.members), groups, *figures, where))
    return table
