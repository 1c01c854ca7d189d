"""From the facts of all ranks to what is wrong, each with its node. No torch.

Rule: pure; a node is held against what most of the others have, the first rank's where there is no
majority.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from mixtrain.checkpoint.directory import MARGIN
from mixtrain.config.choices import Accelerator
from mixtrain.config.memory import GIB
from mixtrain.config.plan import Plan
from mixtrain.training.preflight.node_info import Facts

Problems = Iterator[str]
TO_SPARE = 0.97  # of what was promised: drivers keep some


def problems(plan: Plan, facts: list[Facts]) -> list[str]:
    """Every problem of every node, one sentence each."""
    found = [*same_code(facts), *same_libraries(facts), *directories(facts), *same_data(facts)]
    return found + [
        *enough_disk(plan, facts),
        *enough_gpus(plan, facts),
        *enough_memory(plan, facts),
    ]


def same_code(facts: list[Facts]) -> Problems:
    def words(fact: Facts) -> str:
        return f"commit {fact.commit[:10] or 'unknown'}, source {fact.source[:10]}"

    for node, here, common in odd(first_ranks(facts), lambda fact: (fact.commit, fact.source)):
        yield (
            f"node {node} has another mixtrain ({words(here)}) than {common.node} ({words(common)})"
        )


def same_libraries(facts: list[Facts]) -> Problems:
    for name in sorted({name for fact in facts for name in fact.versions}):
        said = set()
        for node, here, common in odd(facts, lambda fact, name=name: fact.versions.get(name)):
            if node not in said:  # its ranks have most likely the same
                yield (
                    f"node {node} has {name} {here.versions.get(name)} (rank {here.rank}),"
                    f" {common.node} has {common.versions.get(name)}"
                )
            said.add(node)


def directories(facts: list[Facts]) -> Problems:
    for fact in facts:
        for problem in fact.directories:
            yield f"node {fact.node}: {problem}"


def same_data(facts: list[Facts]) -> Problems:
    nodes = first_ranks(facts)
    for path in sorted({path for fact in nodes for path in fact.data}):
        for node, here, common in odd(nodes, lambda fact, path=path: fact.data.get(path, -1)):
            size = here.data.get(path, -1)
            others = common.data.get(path, -1)
            has = "cannot be read" if size < 0 else f"has {size:,} bytes"
            than = "it cannot be read" if others < 0 else f"it has {others:,} bytes"
            yield f"node {node}: {path} {has}, on {common.node} {than}"


def enough_disk(plan: Plan, facts: list[Facts]) -> Problems:
    needed = plan.checkpoint_bytes
    for fact in first_ranks(facts):
        if plan.saves and fact.disk_free < needed + MARGIN and not fact.directories:
            yield (
                f"node {fact.node}: a checkpoint takes {needed:,} bytes and a margin of"
                f" {MARGIN:,}, but {fact.disk_free:,} are free on the disk of run_dir"
            )


def enough_gpus(plan: Plan, facts: list[Facts]) -> Problems:
    """GPUs of a node against trainer.devices, and their memory against the plan's state and device_memory_gib."""
    trainer = plan.config.trainer
    if trainer.accelerator is not Accelerator.gpu:
        return
    for fact in first_ranks(facts):
        if fact.gpus < trainer.devices:
            yield f"node {fact.node} has {fact.gpus} GPUs, but trainer.devices = {trainer.devices}"
    for fact in facts:
        where = f"node {fact.node}: GPU {fact.local_rank} ({fact.gpu_name or 'unknown'})"
        promised = (trainer.device_memory_gib or 0) * GIB
        if fact.gpus and fact.gpu_memory < TO_SPARE * promised:
            yield (
                f"{where} has {fact.gpu_memory / GIB:.1f} GiB, but trainer.device_memory_gib ="
                f" {trainer.device_memory_gib:g}"
            )
        elif fact.gpus and fact.gpu_free < plan.state_bytes:
            yield (
                f"{where} has {fact.gpu_free / GIB:.1f} GiB free of {fact.gpu_memory / GIB:.1f},"
                f" but the state of a rank is {plan.state_bytes / GIB:.1f} GiB; is somebody else"
                " on it?"
            )


def enough_memory(plan: Plan, facts: list[Facts]) -> Problems:
    """On the CPU the state of a node's ranks lies in its memory."""
    if plan.config.trainer.accelerator is not Accelerator.cpu:
        return
    ranks = Counter(fact.node for fact in facts)
    for fact in first_ranks(facts):
        needed = ranks[fact.node] * plan.state_bytes
        if fact.memory_free < needed:
            yield (
                f"node {fact.node} has {fact.memory_free / GIB:.1f} GiB of memory free, but the"
                f" state of its {ranks[fact.node]} ranks is {needed / GIB:.1f} GiB"
            )


def first_ranks(facts: list[Facts]) -> list[Facts]:
    """One rank of every node."""
    return [fact for fact in facts if fact.local_rank == 0]


def odd(facts: list[Facts], value: Callable[[Facts], object]) -> Iterator[tuple[str, Facts, Facts]]:
    """(node, its facts, those of one with the common value) of all whose value is not the common one."""
    values = [value(fact) for fact in facts]
    counts = Counter(values)
    common = max(counts, key=lambda each: (counts[each], -values.index(each)))
    example = facts[values.index(common)]
    for fact, here in zip(facts, values, strict=True):
        if here != common:
            yield fact.node, fact, example
