"""Check the network: result and speed of a small all-reduce and all-to-all in every parallel group.

Rule: every result is compared with the expected one, and every wait has a timeout.
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

# of the tensor: large enough that bandwidth counts, not latency
BYTES = {"cpu": 2**20, "cuda": 2**26}
REPEATS = 3  # the fastest counts; one more call before them opens connections
PATIENCE = timedelta(seconds=60)
GB = 1e9
SLOW = 0.5  # times the median of the kind: slower groups get a warning

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
    """One rank's speeds in one group: bus bandwidth in GB/s as NVIDIA's nccl-tests define it."""

    kind: str
    members: list[int]  # ranks
    all_reduce: float
    all_to_all: float


def device_info(ranks: Ranks) -> dict:
    """Return the fields of NodeInfo that describe this rank's GPU."""
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
    """Measure this rank's groups of more than one rank. Every rank must call.

    Raises a Fault that names the group and this node.
    """
    speeds = []
    for kind, group_of in GROUPS.items():
        group = group_of()
        if group.size() > 1:
            members = torch.distributed.get_process_group_ranks(group)
            speeds.append(Speed(kind, members, *_speeds(ranks, kind, group)))
    return speeds


def _speeds(ranks: Ranks, kind: str, group: ProcessGroup) -> tuple[float, float]:
    """Return (all-reduce, all-to-all) in GB/s; Fault if a result is wrong."""
    size = group.size()
    rank = group.rank()
    count = max(1, BYTES[ranks.device.type] // 4 // size) * size
    addend = torch.full((count,), rank + 1.0, device=ranks.device)
    # rank i sends i * size + j to rank j
    peers = torch.arange(size, device=ranks.device)
    sent = (rank * size + peers).float().repeat_interleave(count // size)
    total = torch.empty_like(addend)
    received = torch.empty_like(sent)

    def all_reduce():
        total.copy_(addend)
        return torch.distributed.all_reduce(total, group=group, async_op=True)

    def all_to_all():
        return torch.distributed.all_to_all_single(received, sent, group=group, async_op=True)

    seconds = [
        _best(ranks, kind, name, work)
        for name, work in (("all-reduce", all_reduce), ("all-to-all", all_to_all))
    ]
    expected = (peers * size + rank).float().repeat_interleave(count // size)
    for name, result, correct in (
        ("all-reduce", total, size * (size + 1) / 2),
        ("all-to-all", received, expected),
    ):
        if wrong := int((result != correct).sum()):
            raise Fault(
                f"node {node_name()}: the {name} of the {kind} group gave {wrong} wrong numbers of"
                f" {count}"
            )
    share = (size - 1) / size * 4 * count / GB
    return 2 * share / seconds[0], share / seconds[1]


def _best(ranks: Ranks, kind: str, name: str, work: Callable) -> float:
    """Return the seconds of the fastest of REPEATS + 1 calls; Fault if one fails."""
    seconds = []
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
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)


class KindSpeeds(NamedTuple):
    """All groups of a kind: (slowest, median) over ranks, and the nodes of the slowest group."""

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


def rows(speeds: list[list[Speed]], nodes: list[str]) -> list[KindSpeeds]:
    """Return a row per kind of group; `speeds` of all ranks, `nodes`: the ranks' nodes."""
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
        slowest_nodes = list(dict.fromkeys(nodes[rank] for rank in slowest.members))
        groups = len({tuple(speed.members) for speed in of_kind})
        table.append(KindSpeeds(kind, len(slowest.members), groups, *figures, slowest_nodes))
    return table
