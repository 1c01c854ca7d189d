"""Slurm's nodes are parsed and compared with the plan, without a Slurm (test_slurm.py has one)."""

from __future__ import annotations

import pytest
from composing import plan_of

from mixtrain.config.rules.launcher import seconds_of
from mixtrain.launch.checks import array_problems, partition_problems, requeue_problems
from mixtrain.launch.cluster import Node, gpus_of

RECIPE = "+recipe=mixtral_8x7b_ep8"
CLUSTER = [
    Node("c1", "cpu", True, 64, 0, "12:00:00"),
    Node("g1", "a100", False, 64, 4, "1-00:00:00"),
    Node("h1", "h100", False, 96, 8, "infinite"),
    Node("h2", "h100", False, 96, 8, "infinite"),
    Node("h3", "h100", False, 96, 4, "infinite"),
]


@pytest.mark.parametrize(
    "gres, gpus",
    [
        ("(null)", 0),
        ("gpu:8", 8),
        ("gpu:h100:8(S:0-1)", 8),
        ("gpu:a100:4(S:0),gpu:t4:2(S:1)", 6),
        ("nic:2,gpu:2", 2),
        ("gpu:tesla:4(IDX:0-3)", 4),
        ("shard:16", 0),
    ],
)
def test_gpus_are_counted_in_slurms_words(gres, gpus):
    assert gpus_of(gres) == gpus


@pytest.mark.parametrize(
    "time, seconds",
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-02:30:05", 95405),
        ("UNLIMITED", float("inf")),
        ("infinite", float("inf")),
        ("soon", None),
        ("1:2:3:4", None),
        ("-1", None),
    ],
)
def test_a_time_is_read_as_slurm_does(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    "overrides, problems",
    [
        (["launcher.partition=h100"], []),
        (["launcher.partition='a100,h100'"], []),
        (
            ["launcher.partition=h10"],
            [
                "launcher.partition = h10: did you mean h100? the partitions of"
                " this cluster are cpu, a100, h100"
            ],
        ),
        (
            [],
            [
                "launcher.gpus_per_node = 8 (from trainer.devices): no node of partition cpu has"
                " any; use another launcher.partition"
            ],
        ),
        (
            ["launcher.partition=a100"],
            [
                "launcher.gpus_per_node = 8 (from trainer.devices): a node of partition a100 has 4"
                " at most; use trainer.devices=4 and more nodes, or another launcher.partition"
            ],
        ),
        (
            ["launcher.partition=h100", "trainer.num_nodes=3", "trainer.global_batch_size=240"],
            ["trainer.num_nodes = 3, but partition h100 has 2 nodes with 8 GPUs; use 2"],
        ),
        (
            [
                "launcher.partition=a100",
                "launcher.time=2-00:00:00",
                "trainer.devices=4",
                "trainer.num_nodes=4",
            ],
            [
                "launcher.time = 2-00:00:00 is more than partition a100 allows; use at most"
                " 1-00:00:00",
                "trainer.num_nodes = 4, but partition a100 has 1 nodes; use 1",
            ],
        ),
        (["launcher.partition=h100", "launcher.time=99-00:00:00"], []),
    ],
)
def test_a_plan_that_the_partition_cannot_hold_is_refused_with_both_numbers(overrides, problems):
    assert list(partition_problems(plan_of(RECIPE, *overrides), CLUSTER)) == problems


def test_a_cluster_without_a_default_partition_is_given_its_names():
    (problem,) = partition_problems(plan_of(RECIPE), CLUSTER[1:])
    assert problem == "launcher.partition = null, but this cluster has no default; use a100 or h100"


@pytest.mark.parametrize(
    "overrides, refused",
    [
        (["launcher.sbatch_args.array=0-3"], True),
        (["launcher.sbatch_args.array=0-3%2"], True),
        (["launcher.sbatch_args.array=0-3%1"], False),
        (
            ["launcher.sbatch_args.array=0-3", "run_dir='runs/${oc.env:SLURM_ARRAY_TASK_ID,0}'"],
            False,
        ),
        ([], False),
    ],
)
def test_an_array_side_by_side_needs_a_directory_for_each(overrides, refused):
    assert bool(list(array_problems(plan_of(*overrides), overrides))) is refused


def test_a_run_that_may_not_be_resumed_is_not_sent():
    (problem,) = requeue_problems(plan_of("checkpoint.resume=never"))
    assert problem.startswith("checkpoint.resume = never would refuse the job when it returns")
    assert list(requeue_problems(plan_of("checkpoint.resume=never", "checkpoint=none"))) == []
    assert list(requeue_problems(plan_of())) == []
