"""Jobs on a real Slurm, submitted with the project's tools: they train, return, fail and end.

Tests share jobs and one cluster, since each start of four ranks takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from composing import ROOT
from slurm_cluster import Cluster, lacking, running, wait

from mixtrain.proof.drill.runs import SMALL, records
from mixtrain.system.status import read_status

pytestmark = [
    pytest.mark.long,
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(lacking()), reason=f"no Slurm here: {', '.join(lacking())} not installed"
    ),
]
SHOWS = [
    "+recipe=mixtral_8x7b_ep8",
    "+shrink=laptop",
    "trainer.num_nodes=2",
    "trainer.devices=2",
    "parallel.expert_model_parallel_size=4",
    "trainer.max_steps=20",
]
RUN = "runs/mixtral_8x7b_ep8-laptop"  # its run_dir, in the cluster's folder
ONE_EACH = [*SMALL, "trainer.devices=1", "trainer.preflight=never"]  # one rank per node
ENDLESS = ["trainer.max_steps=100000", "checkpoint.save_interval=100000"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as up:
        yield up


@pytest.fixture(scope="module")
def limited(cluster) -> str:
    """An endless run in a partition with a time limit of a minute; other tests run meanwhile."""
    overrides = [*ONE_EACH, "parallel=ep1", *ENDLESS, "run_dir=limited", "launcher.partition=short"]
    return submit(cluster, *overrides, "launcher.sbatch_args.signal=USR1@10")


@pytest.fixture(scope="module")
def whole(cluster, limited) -> str:
    """The undisturbed job, after its end."""
    job = submit(cluster, *SHOWS)
    cluster.wait_for(job, "COMPLETED")
    return job


def submit(cluster: Cluster, *overrides: str) -> str:
    """Submit with tools/submit.py; return the job's number."""
    result = cluster.run(sys.executable, str(ROOT / "tools/submit.py"), *overrides, check=False)
    assert result.returncode == 0, result.stderr
    return number_in(result.stdout)


def number_in(text: str) -> str:
    return re.search(r"^submitted +job (\d+): ", text, flags=re.MULTILINE)[1]


def log_of(cluster: Cluster, job: str, run_dir: str, rank: int | None = None) -> str:
    where = cluster.folder / run_dir / "logs" / f"job_{job}"
    return (where.with_suffix(".log") if rank is None else where / f"rank_{rank}.log").read_text()


def wait_for_step(cluster: Cluster, job: str, run_dir: str, step: int) -> None:
    def reached() -> bool:
        assert cluster.state(job) in ("PENDING", "RUNNING"), log_of(cluster, job, run_dir)
        return (read_status(cluster.folder / run_dir) or {"step": 0})["step"] >= step

    wait(reached, 300, lambda: f"step {step} of {run_dir}\n{cluster.logs()}")


def jobs_so_far(cluster: Cluster) -> str:
    return re.search(r"NEXT_JOB_ID\s*= (\d+)", cluster.run("scontrol", "show", "config").stdout)[1]


def test_a_job_on_two_nodes_trains_to_the_end_with_a_log_for_every_rank(cluster, whole):
    status = read_status(cluster.folder / RUN)
    assert (status["state"], status["step"]) == ("finished", 20)
    assert [
        record["step"] for record in records(cluster.folder / RUN) if "lm_loss" in record
    ] == list(range(1, 21))
    logs = cluster.folder / RUN / "logs" / f"job_{whole}"
    rows = [line.split("\t") for line in (logs / "index.txt").read_text().splitlines()]
    assert rows[0] == ["rank", "node", "log"]
    assert [row[:2] for row in rows[1:]] == [["0", "n0"], ["1", "n0"], ["2", "n1"], ["3", "n1"]]
    assert all((logs / row[2]).exists() for row in rows[1:])
    assert "finished after 20 of 20 steps" in log_of(cluster, whole, RUN, 0)
    assert "finished after 20 steps" in log_of(cluster, whole, RUN)


def test_the_ranks_of_both_nodes_have_passed_the_preflight(cluster, whole):
    found = json.loads((cluster.folder / RUN / "preflight.json").read_text())
    assert [rank["node"] for rank in found["ranks"]] == ["n0", "n0", "n1", "n1"]
    assert found["problems"] == found["parity"]["outside"] == []
    assert {row["kind"]: row["ranks"] for row in found["wires"]} == {"all": 4, "DP": 4, "EP": 4}
    assert all(row["all_reduce"][0] > 0 and row["all_to_all"][0] > 0 for row in found["wires"])


def test_print_writes_byte_for_byte_what_slurm_has_been_sent(cluster, whole):
    before = jobs_so_far(cluster)
    printed = cluster.run(sys.executable, str(ROOT / "tools/submit.py"), *SHOWS, "--print")
    kept = cluster.run("scontrol", "write", "batch_script", whole, "-").stdout
    assert printed.stdout == kept
    assert kept.startswith("#!") and all(word in kept for word in SHOWS)
    assert f"sbatch --parsable {cluster.folder}/{RUN}/job.sbatch" in printed.stderr
    assert jobs_so_far(cluster) == before


def test_a_job_that_meets_its_time_limit_returns_and_one_that_is_cancelled_does_not(
    cluster, limited
):
    wait(lambda: cluster.is_requeued(limited), 100, cluster.logs)
    # as an administrator may do; one time limit suffices for the test
    cluster.run("scontrol", "update", "PartitionName=short", "MaxTime=60")
    cluster.run("scontrol", "update", f"JobId={limited}", "TimeLimit=30")
    cluster.let_return(limited)
    log = log_of(cluster, limited, "limited")
    left = re.findall(
        r"stopped by SIGUSR1, after (\d+) of 100000 steps: returning to the queue", log
    )
    assert left and "TIME LIMIT" not in log  # it ended before the limit
    # during other tests it may have reached two limits
    wait_for_step(cluster, limited, "limited", int(left[-1]) + 3)
    cluster.run("scancel", limited)
    cluster.wait_for(limited, "CANCELLED")
    wait(lambda: not cluster.ask("squeue", "--job", limited), 45, cluster.logs)  # it is saving
    last = read_status(cluster.folder / "limited")
    assert (last["state"], last["reason"]) == ("stopped", "stopped by SIGTERM")
    steps = [
        record["step"] for record in records(cluster.folder / "limited") if "lm_loss" in record
    ]
    assert steps == list(range(1, last["step"] + 1))  # none lost, none twice
    assert f"resumed from limited/iter_{int(left[-1]):07d}" in log_of(
        cluster, limited, "limited", 0
    )


def test_a_job_signalled_at_a_step_returns_and_ends_with_the_metrics_of_one_that_was_not(
    cluster, whole
):
    job = submit(cluster, *SHOWS, "run_dir=signalled")
    wait_for_step(cluster, job, "signalled", 7)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING")
    status = read_status(cluster.folder / "signalled")
    assert (status["state"], status["reason"]) == ("stopped", "stopped by SIGUSR1") and 7 <= status[
        "step"
    ] < 20
    cluster.let_return(job)
    cluster.wait_for(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "1"
    assert f"resumed from signalled/iter_{status['step']:07d}" in log_of(
        cluster, job, "signalled", 0
    )
    assert records(cluster.folder / "signalled") == records(cluster.folder / RUN)
    assert f"after {status['step']} of 20 steps: returning to the queue" in log_of(
        cluster, job, "signalled"
    )


def test_a_job_by_hand_whose_node_is_set_down_returns_and_loses_nothing(cluster, whole):
    by_hand = {"MIXTRAIN_PYTHON": sys.executable, "MIXTRAIN_ROOT": str(ROOT)}
    overrides = [*SHOWS, "run_dir=down", "checkpoint.save_interval=4", "trainer.preflight=never"]
    script = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--output=down_%j.log",
        str(ROOT / "slurm/train.sbatch"),
    ]
    before = cluster.environment
    cluster.environment = cluster.environment | by_hand
    job = cluster.run(*script, *overrides).stdout.strip()
    cluster.environment = before
    wait(
        lambda: (read_status(cluster.folder / "down") or {"step": 0})["step"] >= 6,
        120,
        cluster.logs,
    )
    cluster.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    wait(lambda: cluster.job(job).get("Restarts") == "1", 30, cluster.logs)
    cluster.wait_for(job, "PENDING")
    # the node may have returned by itself
    cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME", check=False)
    cluster.let_return(job)
    cluster.wait_for(job, "COMPLETED")
    assert "resumed from down/iter_" in log_of(cluster, job, "down", 0)
    assert records(cluster.folder / "down") == records(cluster.folder / RUN)


def test_a_run_that_fails_is_named_and_does_not_return(cluster, limited):
    overrides = [*ONE_EACH, "parallel=ep2", "trainer.num_nodes=2", *ENDLESS, "run_dir=failing"]
    # launcher=auto: two nodes, so a job
    result = cluster.run(sys.executable, str(ROOT / "train.py"), *overrides)
    job = number_in(result.stdout)
    wait_for_step(cluster, job, "failing", 3)
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    cluster.wait_for(job, "FAILED", seconds=60)
    assert cluster.job(job)["Restarts"] == "0"
    status = read_status(cluster.folder / "failing")
    log = log_of(cluster, job, "failing")
    assert status["state"] == "failed"
    assert "rank 1 on n1: Killed" in log and "this job does not return" in log


def process_of(job: str, rank: int) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()} <= set(variables):
                if (
                    b"train.py" in command
                    and b"srun" not in command
                    and b"slurmstepd" not in command
                ):
                    return int(entry.name)
    raise AssertionError(f"no rank {rank} of job {job}")


def test_an_array_and_a_dependency_run_by_sbatch_args(cluster, limited):
    task = "${oc.env:SLURM_ARRAY_TASK_ID,0}"
    overrides = [*ONE_EACH, "parallel=ep1", "trainer.max_steps=3", "checkpoint=last"]
    array = submit(
        cluster,
        *overrides,
        f"seed='{task}'",
        f"run_dir='array-{task}'",
        "launcher.sbatch_args.array=1-2",
    )
    follows = ["run_dir=after", f"launcher.sbatch_args.dependency=afterok:{array}"]
    after = submit(cluster, *overrides, *follows)
    assert cluster.job(after)["Dependency"].startswith(f"afterok:{array}")
    cluster.wait_for(after, "COMPLETED")
    losses = [records(cluster.folder / name)[0]["lm_loss"] for name in ("array-1", "array-2")]
    assert losses[0] != losses[1]
    assert not (cluster.folder / "array-0" / "status.json").exists()


# What is refused before a job is sent


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["parallel.expert_model_parallel_size=5"],
            "parallel.expert_model_parallel_size = 5 must divide model.num_moe_experts = 8; use 4"
            " or 8",
        ),
        (
            ["launcher.partition=gpus"],
            "launcher.partition = gpus: did you mean gpu? the partitions of"
            " this cluster are cpu, gpu, short",
        ),
        (
            ["trainer.num_nodes=4", "trainer.devices=1"],
            "trainer.num_nodes = 4, but partition cpu has 2 nodes; use 2",
        ),
        (
            ["launcher.gpus_per_node=3", "launcher.partition=gpu"],
            "launcher.gpus_per_node = 3 (as typed): a node of partition gpu has 2 at most",
        ),
        (
            [
                "launcher.gpus_per_node=2",
                "launcher.partition=short",
                "trainer.num_nodes=1",
                "trainer.devices=4",
            ],
            "launcher.gpus_per_node = 2 (as typed): no node of partition short has any",
        ),
        (
            ["launcher.time=2:00:00"],
            "launcher.time = 2:00:00 is more than partition cpu allows; use at most 1:00:00",
        ),
        (
            ["launcher.sbatch_args.no_such_flag=1"],
            "sbatch refuses the job: unrecognized option '--no-such-flag=1'",
        ),
        (["launcher.sbatch_args.constraint=big"], "(launcher.sbatch_args.constraint = big)"),
        (
            ["launcher.container_image=/no/such.sqsh"],
            "launcher.container_image = /no/such.sqsh: no such file",
        ),
        (
            [
                "data=indexed",
                "data.data_path=[/no/corpus]",
                "data.tokenizer=/no/tokenizer",
                "data.seq_length=64",
                "data.num_workers=0",
            ],
            "data.tokenizer = /no/tokenizer: no such directory",
        ),
        (["launcher.env_file=no.sh"], "launcher.env_file = no.sh: no such file"),
        (
            ["launcher.sbatch_args.array=0-3"],
            "launcher.sbatch_args.array = 0-3 starts jobs side by side in one run_dir",
        ),
        (["launcher=local"], "launcher = local does not submit"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_sent(cluster, overrides, message):
    before = jobs_so_far(cluster)
    shown = cluster.run(
        sys.executable,
        str(ROOT / "tools/submit.py"),
        *SHOWS,
        *overrides,
        "run_dir=refused",
        check=False,
    )
    assert shown.returncode == 2 and "Traceback" not in shown.stderr
    assert message in shown.stderr, shown.stderr
    if "sbatch refuses" not in shown.stderr:  # --test-only also uses up a job number
        assert jobs_so_far(cluster) == before
    assert not (cluster.folder / "refused").exists()
