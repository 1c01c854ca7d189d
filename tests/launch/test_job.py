"""A job after its ranks have ended: it returns, ends, or names the failed rank. Without Slurm."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from composing import path_without_slurm

from mixtrain.launch import job
from mixtrain.system.status import read_status, write_status
from mixtrain.training.run_directory import LOCK


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", path_without_slurm())
    (tmp_path / "run" / "logs" / "job_17").mkdir(parents=True)
    return tmp_path / "run"


def ended(capsys, run_dir: Path, code: int, *overrides: str) -> tuple[str, str]:
    """Return (the verdict for the script, the text for the job's log)."""
    assert job.main(["end", str(code), f"run_dir={run_dir}", *overrides]) == 0
    output = capsys.readouterr()
    return output.out.strip(), output.err


def status(run_dir: Path, state: str, step: int, reason: str = "stopped by SIGUSR1") -> None:
    write_status(run_dir, state=state, step=step, max_steps=300, reason=reason)


def test_a_run_that_was_stopped_returns_and_says_at_which_step(capsys, run_dir):
    status(run_dir, "stopped", 40)
    verdict, message = ended(capsys, run_dir, 0)
    assert verdict == "return"
    assert "stopped by SIGUSR1, after 40 of 300 steps: returning to the queue" in message


@pytest.mark.parametrize(
    "state, code, verdict", [("finished", 0, "0"), ("failed", 1, "1"), ("running", 2, "2")]
)
def test_a_run_that_has_finished_or_failed_does_not_return(capsys, run_dir, state, code, verdict):
    status(run_dir, state, 300)
    assert ended(capsys, run_dir, code)[0] == verdict


def test_a_run_whose_ranks_failed_does_not_return_even_if_it_was_stopped_before(capsys, run_dir):
    status(run_dir, "stopped", 40)
    verdict, message = ended(capsys, run_dir, 1)
    assert verdict == "1" and "does not return" in message


def test_a_job_returns_only_so_often_without_a_step_further(capsys, run_dir):
    status(run_dir, "stopped", 40)
    assert [ended(capsys, run_dir, 0, "launcher.max_requeues=2")[0] for _ in range(2)] == [
        "return"
    ] * 2
    verdict, message = ended(capsys, run_dir, 0, "launcher.max_requeues=2")
    assert verdict == "1" and "returned 2 times and came no further than step 40" in message
    assert "came no further" in read_status(run_dir)["reason"]
    status(run_dir, "stopped", 41)
    assert ended(capsys, run_dir, 0, "launcher.max_requeues=2")[0] == "return"


def test_a_job_that_may_not_return_ends(capsys, run_dir):
    status(run_dir, "stopped", 40)
    assert ended(capsys, run_dir, 0, "launcher.max_requeues=0")[0] == "1"


def test_a_preflight_does_not_return_and_leaves_the_runs_status(capsys, run_dir):
    status(run_dir, "stopped", 40)
    (run_dir / "preflight" / "logs" / "job_17").mkdir(parents=True)
    status(run_dir / "preflight", "finished", 0, "preflight")
    assert ended(capsys, run_dir, 0, "trainer.mode=preflight")[0] == "0"
    assert read_status(run_dir)["state"] == "stopped"


def test_the_rank_that_failed_first_is_named_in_the_log_and_the_status(capsys, run_dir):
    status(run_dir, "running", 7, "")
    logs = run_dir / "logs" / "job_17"
    (logs / "srun.log").write_text(
        "srun: error: node7: task 3: Killed\nsrun: Terminating StepId=17.1\n"
        "srun: error: node6: tasks 0-1: Exited with exit code 1\n"
    )
    verdict, message = ended(capsys, run_dir, 137)
    assert verdict == "1"
    assert message.splitlines()[1:3] == [
        "  rank 3 on node7: Killed",
        "  rank 0-1 on node6: Exited with exit code 1",
    ]
    found = read_status(run_dir)
    assert (found["state"], found["reason"]) == ("failed", "rank 3 on node7: Killed")


def test_what_a_rank_had_to_say_stands_in_the_jobs_log(capsys, run_dir):
    status(run_dir, "running", 7, "")
    logs = run_dir / "logs" / "job_17"
    (logs / "rank_0.log").write_text("training\n")
    (logs / "rank_1.log").write_text(
        "mixtrain: 1 problem on node n1:\n  - data.data_path: no file /data/a.bin\n"
    )
    verdict, message = ended(capsys, run_dir, 2)
    assert verdict == "2" and "  - data.data_path: no file /data/a.bin" in message
    assert "no file /data/a.bin" in read_status(run_dir)["reason"]


def test_a_return_that_cannot_be_counted_is_none(capsys, run_dir):
    status(run_dir, "stopped", 40)
    shutil.rmtree(run_dir / "logs")
    verdict, message = ended(capsys, run_dir, 0)
    assert verdict == "1" and "Traceback" not in message
    unwritten = "job_17/returns.jsonl cannot be written (No such file or directory),"
    assert f"{unwritten}\n  so this job does not return" in message


def test_a_verdict_that_cannot_be_written_stands_in_the_jobs_log_with_what_to_type(capsys, run_dir):
    status(run_dir, "running", 7, "")
    (run_dir / "status.json.tmp").mkdir()  # has the effect of a disk without room for another file
    verdict, message = ended(capsys, run_dir, 1)
    assert verdict == "1" and "Traceback" not in message
    last = message.splitlines()[-1]
    message = (
        "status.json cannot be written (Is a directory) and does not say so; there is no"
        " complete checkpoint: run"
    )
    assert last == f"mixtrain: exit code 1; {message} the same command again to start from step 0"


def test_what_a_full_disk_kept_out_of_the_logs_is_read_in_the_status(capsys, run_dir):
    status(run_dir, "failed", 7, "step 8: metrics.jsonl cannot be written")
    assert "mixtrain: step 8: metrics.jsonl cannot be written\n" in ended(capsys, run_dir, 1)[1]


def test_the_status_of_a_run_that_another_job_is_at_is_left_alone(capsys, run_dir):
    status(run_dir, "running", 7, "")
    with open(run_dir / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended(capsys, run_dir, 2)
        assert read_status(run_dir)["state"] == "running"
    ended(capsys, run_dir, 2)
    assert read_status(run_dir)["state"] == "failed"


def test_a_job_starts_with_the_plans_nodes_and_ranks(capsys, run_dir, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    overrides = ["trainer.num_nodes=2", "trainer.devices=1", "run_dir=run"]
    assert job.main(["begin", *overrides]) == 0
    assert capsys.readouterr().out == f"2\t1\t{os.getcwd()}/run\n"
    assert job.main(["begin", *overrides, "trainer.mode=preflight"]) == 0
    assert capsys.readouterr().out == f"2\t1\t{os.getcwd()}/run/preflight\n"


def test_a_job_of_other_nodes_than_the_plans_is_refused(capsys, run_dir, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert job.main(["begin", "trainer.num_nodes=2", "trainer.devices=1"]) == 2
    assert (
        "this job has 1 nodes, but trainer.num_nodes = 2; sbatch --nodes=2"
        in capsys.readouterr().err
    )


def test_a_directory_that_is_another_at_every_return_is_refused(capsys, run_dir):
    assert job.main(["begin", "run_dir='runs/${now:%f}'"]) == 2
    assert "another run_dir every time that the job returns" in capsys.readouterr().err


def test_the_container_says_where_the_script_finds_its_folder(capsys, run_dir, tmp_path):
    overrides = [
        "run_dir=/scratch/run",
        "launcher.container_image=image",
        f"launcher.container_mounts=['{tmp_path}:/scratch']",
    ]
    assert job.main(["begin", *overrides]) == 0
    assert capsys.readouterr().out == f"1\t2\t{tmp_path}/run\n"


def test_returns_are_noted_with_their_step(capsys, run_dir):
    status(run_dir, "stopped", 40)
    ended(capsys, run_dir, 0)
    (line,) = (run_dir / "logs" / "job_17" / job.RETURNS).read_text().splitlines()
    assert json.loads(line)["step"] == 40


def test_a_run_that_saves_nothing_does_not_return(capsys, run_dir):
    status(run_dir, "stopped", 40)
    verdict, message = ended(capsys, run_dir, 0, "checkpoint=none")
    assert verdict == "0" and "does not return" in message
