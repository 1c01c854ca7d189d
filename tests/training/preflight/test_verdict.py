"""Problems of a node name it: made-up node information with one fault at a time."""

from __future__ import annotations

import pytest
from composing import plan_of

from mixtrain.config.memory import GIB
from mixtrain.training.preflight import network
from mixtrain.training.preflight.node_info import NodeInfo
from mixtrain.training.preflight.verdict import problems

NODES = ("n0", "n1", "n2")
VERSIONS = {"python": "3.12.3", "torch": "2.13.0", "megatron-core": "0.19.2"}
CPU = plan_of(
    "parallel.expert_model_parallel_size=2",
    "trainer.devices=2",
    "trainer.num_nodes=3",
    "trainer.global_batch_size=24",
)
GPU = plan_of(
    "trainer.accelerator=gpu",
    "trainer.devices=2",
    "trainer.num_nodes=3",
    "trainer.global_batch_size=24",
    "trainer.device_memory_gib=79",
)


def infos_of(**changed: object) -> list[NodeInfo]:
    """Return three nodes of two ranks; `n1_memory_free=0` sets a value on the ranks of n1."""
    found = []
    for rank in range(6):
        node = NODES[rank // 2]
        info = NodeInfo(
            rank=rank,
            local_rank=rank % 2,
            node=node,
            machine=node,
            commit="a" * 40,
            source="b" * 64,
            versions=VERSIONS,
            memory_free=8 * GIB,
            gpus=2,
            gpu_name="H100",
            gpu_memory=int(79.2 * GIB),
            gpu_free=int(78 * GIB),
            directories=[],
            disk_free=10**12,
            data={} if rank % 2 else {"/data/a.bin": 100},
        )
        own = {
            key.split("_", 1)[1]: value
            for key, value in changed.items()
            if key.startswith(f"{node}_")
        }
        found.append(info._replace(**own))
    return found


def test_nodes_that_are_alike_have_no_problem():
    assert problems(CPU, infos_of()) == problems(GPU, infos_of()) == []


@pytest.mark.parametrize(
    "plan, changed, said",
    [
        (
            CPU,
            {"n1_commit": "c" * 40},
            "node n1 has another mixtrain (commit cccccccccc, source bbbbbbbbbb) than n0 (commit"
            " aaaaaaaaaa, source bbbbbbbbbb)",
        ),
        (
            CPU,
            {"n0_source": "d" * 64, "n0_commit": ""},
            "node n0 has another mixtrain (commit unknown, source dddddddddd) than n1 (commit"
            " aaaaaaaaaa, source bbbbbbbbbb)",
        ),
        (
            CPU,
            {"n2_versions": {**VERSIONS, "torch": "2.12.1"}},
            "node n2 has torch 2.12.1 (rank 4), n0 has 2.13.0",
        ),
        (
            CPU,
            {"n2_versions": {k: v for k, v in VERSIONS.items() if k != "torch"}},
            "node n2 has torch None (rank 4), n0 has 2.13.0",
        ),
        (
            CPU,
            {"n1_data": {"/data/a.bin": -1}},
            "node n1: /data/a.bin cannot be read, on n0 it has 100 bytes",
        ),
        (
            CPU,
            {"n1_data": {"/data/a.bin": 99}},
            "node n1: /data/a.bin has 99 bytes, on n0 it has 100 bytes",
        ),
        (
            CPU,
            {"n1_disk_free": 1000},
            "node n1: a checkpoint takes 182,578,176 bytes and a margin of 1,048,576, but 1,000"
            " are free on the disk of run_dir",
        ),
        (
            CPU,
            {"n1_memory_free": GIB // 100},
            "node n1 has 0.0 GiB of memory free, but the state of its 2 ranks is 0.1 GiB",
        ),
        (GPU, {"n2_gpus": 1}, "node n2 has 1 GPUs, but trainer.devices = 2"),
    ],
)
def test_a_node_that_is_not_like_the_others_or_the_plan_is_named_with_both_values(
    plan, changed, said
):
    assert problems(plan, infos_of(**changed))[0] == said


def test_what_a_node_says_of_its_directories_is_said_with_its_name():
    assert problems(
        CPU, infos_of(n2_directories=["run_dir = x cannot be written: Read-only file system"])
    )[0] == ("node n2: run_dir = x cannot be written: Read-only file system")


def test_a_gpu_that_is_too_small_or_taken_is_named_with_its_number():
    small = problems(GPU, infos_of(n1_gpu_memory=40 * GIB, n1_gpu_name="A100"))
    assert small == [
        f"node n1: GPU {number} (A100) has 40.0 GiB, but trainer.device_memory_gib = 79"
        for number in (0, 1)
    ]
    (taken, _) = problems(GPU, infos_of(n1_gpu_free=GIB // 100))
    assert taken.startswith(
        "node n1: GPU 0 (H100) has 0.0 GiB free of 79.2, but the state of a rank is 0.1 GiB"
    )


def test_all_that_is_wrong_is_said_together():
    facts = infos_of(n1_commit="c" * 40, n2_memory_free=0)
    facts[0] = facts[0]._replace(directories=["no"])  # the first rank of a node speaks of them
    assert [problem.split(" ")[1].strip(":") for problem in problems(CPU, facts)] == [
        "n1",
        "n0",
        "n2",
    ]


def test_the_slow_group_of_a_kind_is_named_by_its_nodes():
    def speed(kind, members, value):
        return network.Speed(kind, members, value, value)

    speeds = [
        [speed("EP", [0, 1], 40.0)],
        [speed("EP", [0, 1], 40.0)],
        [speed("EP", [2, 3], 40.0)],
        [speed("EP", [2, 3], 40.0)],
        [speed("EP", [4, 5], 3.0)],
        [speed("EP", [4, 5], 3.0)],
    ]
    (row,) = network.rows(speeds, ["n0", "n0", "n1", "n1", "n2", "n2"])
    assert (row.groups, row.all_reduce, row.slowest, row.is_uneven) == (
        3,
        (3.0, 40.0),
        ["n2"],
        True,
    )
    speeds[4] = speeds[5] = [speed("EP", [4, 5], 30.0)]
    assert not network.rows(speeds, ["n0"] * 6)[0].is_uneven
