"""Collectives of Python objects, over real ranks and without a process group."""

from __future__ import annotations

from typing import Any

import torch
from rank_workers import run_ranks

from mixtrain.system import collectives
from mixtrain.system.rank_identity import Identity


def answers(identity: Identity) -> dict[str, Any]:
    torch.distributed.init_process_group(
        "gloo", init_method=identity.rendezvous, rank=identity.rank, world_size=identity.world_size
    )
    rank = identity.rank
    calls = []
    found = {
        "gather": collectives.gather({"rank": rank}),
        "gather_on_first": collectives.gather_on_first(rank),
        "from_first": collectives.from_first(lambda: calls.append(rank) or f"rank {rank}"),
        "calls": calls,
        "failures": collectives.failures(f"problem {rank}" if rank else ""),
        "first_problem": collectives.first_problem([f"problem {rank}"] if rank else []),
        "no_problem": collectives.first_problem(""),
        "ranks_where": collectives.ranks_where(rank != 1),
        "total": collectives.total(rank + 1, torch.device("cpu")),
    }
    torch.distributed.destroy_process_group()
    return found


def test_all_ranks_get_the_same_answer(tmp_path):
    results = run_ranks(3, answers, tmp_path)
    assert [found.pop("gather_on_first") for found in results] == [[0, 1, 2], [], []]
    assert [found.pop("calls") for found in results] == [[0], [], []]
    same = {
        "gather": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        "from_first": "rank 0",
        "failures": [[1, "problem 1"], [2, "problem 2"]],  # by way of JSON
        "first_problem": ["problem 1"],
        "no_problem": "",
        "ranks_where": [0, 2],
        "total": 6,
    }
    assert results == [same] * 3


def test_without_a_process_group_the_caller_is_the_only_rank():
    assert collectives.gather(5) == [5]
    assert collectives.from_first(lambda: "read") == "read"
    assert collectives.first_problem(["wrong"]) == ["wrong"]
    assert collectives.first_problem([]) == []
