"""Find the problems in the node information of all ranks, each with its node. No torch.

Rule: pure functions; a node is compared with the most common value, or the first rank's if there is
none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from mixtrain.checkpoint.directory import MARGIN
from mixtrain.config.choices import Accelerator
from mixtrain.config.memory import GIB
from mixtrain.config.plan import Plan
from mixtrain.training.preflight.node_info import NodeInfo

Problems = Iterator[str]
MEMORY_SHARE = 0.97  # of trainer.device_memory_gib that must exist: drivers reserve some


def problems(plan: Plan, infos: list[NodeInfo]) -> list[str]:
    """Return every problem of every node, one sentence each."""
    return [
        *same_code(infos),
        *same_libraries(infos),
        *directories(infos),
        *same_data(infos),
        *enough_disk(plan, infos),
        *enough_gpus(plan, infos),
        *enough_memory(plan, infos),
    ]


def same_code(infos: list[NodeInfo]) -> Problems:
    def code(info: NodeInfo) -> str:
        return f"commit {info.commit[:10] or 'unknown'}, source {info.source[:10]}"

    for info, common in deviations(first_ranks(infos), lambda info: (info.commit, info.source)):
        yield (
            f"node {info.node} has another mixtrain ({code(info)}) than {common.node}"
            f" ({code(common)})"
        )


def same_libraries(infos: list[NodeInfo]) -> Problems:
    for name in sorted({name for info in infos for name in info.versions}):
        reported = set()
        for info, common in deviations(infos, lambda info, name=name: info.versions.get(name)):
            if info.node not in reported:  # its other ranks most likely have the same version
                yield (
                    f"node {info.node} has {name} {info.versions.get(name)} (rank {info.rank}),"
                    f" {common.node} has {common.versions.get(name)}"
                )
            reported.add(info.node)


def directories(infos: list[NodeInfo]) -> Problems:
    for info in infos:
        for problem in info.directories:
            yield f"node {info.node}: {problem}"


def same_data(infos: list[NodeInfo]) -> Problems:
    nodes = first_ranks(infos)
    for path in sorted({path for info in nodes for path in info.data}):
        for info, common in deviations(nodes, lambda info, path=path: info.data.get(path, -1)):
            size = info.data.get(path, -1)
            common_size = common.data.get(path, -1)
            has = "cannot be read" if size < 0 else f"has {size:,} bytes"
            common_has = "it cannot be read" if common_size < 0 else f"it has {common_size:,} bytes"
            yield f"node {info.node}: {path} {has}, on {common.node} {common_has}"


def enough_disk(plan: Plan, infos: list[NodeInfo]) -> Problems:
    needed = plan.checkpoint_bytes
    for info in first_ranks(infos):
        if plan.saves and info.disk_free < needed + MARGIN and not info.directories:
            yield (
                f"node {info.node}: a checkpoint takes {needed:,} bytes and a margin of"
                f" {MARGIN:,}, but {info.disk_free:,} are free on the disk of run_dir"
            )


def enough_gpus(plan: Plan, infos: list[NodeInfo]) -> Problems:
    """Check each node's GPUs: their number (trainer.devices) and their memory.

    The memory must hold trainer.device_memory_gib in total, and the plan's state of a rank must be
    free.
    """
    trainer = plan.config.trainer
    if trainer.accelerator is not Accelerator.gpu:
        return
    for info in first_ranks(infos):
        if info.gpus < trainer.devices:
            yield f"node {info.node} has {info.gpus} GPUs, but trainer.devices = {trainer.devices}"
    for info in infos:
        where = f"node {info.node}: GPU {info.local_rank} ({info.gpu_name or 'unknown'})"
        expected = (trainer.device_memory_gib or 0) * GIB
        if info.gpus and info.gpu_memory < MEMORY_SHARE * expected:
            yield (
                f"{where} has {info.gpu_memory / GIB:.1f} GiB, but trainer.device_memory_gib ="
                f" {trainer.device_memory_gib:g}"
            )
        elif info.gpus and info.gpu_free < plan.state_bytes:
            yield (
                f"{where} has {info.gpu_free / GIB:.1f} GiB free of {info.gpu_memory / GIB:.1f},"
                f" but the state of a rank is {plan.state_bytes / GIB:.1f} GiB; is another"
                " process using it?"
            )


def enough_memory(plan: Plan, infos: list[NodeInfo]) -> Problems:
    """Check, on the CPU, that the memory of each node holds the state of its ranks."""
    if plan.config.trainer.accelerator is not Accelerator.cpu:
        return
    ranks = Counter(info.node for info in infos)
    for info in first_ranks(infos):
        needed = ranks[info.node] * plan.state_bytes
        if info.memory_free < needed:
            yield (
                f"node {info.node} has {info.memory_free / GIB:.1f} GiB of memory free, but the"
                f" state of its {ranks[info.node]} ranks is {needed / GIB:.1f} GiB"
            )


def first_ranks(infos: list[NodeInfo]) -> list[NodeInfo]:
    """Return the first rank of every node."""
    return [info for info in infos if info.local_rank == 0]


def deviations(
    infos: list[NodeInfo], value: Callable[[NodeInfo], object]
) -> Iterator[tuple[NodeInfo, NodeInfo]]:
    """Yield (rank, a rank with the most common value) for every rank with another value."""
    values = [value(info) for info in infos]
    counts = Counter(values)
    common_value = max(counts, key=lambda each: (counts[each], -values.index(each)))
    common = infos[values.index(common_value)]
    for info, own_value in zip(infos, values, strict=True):
        if own_value != common_value:
            yield info, common
