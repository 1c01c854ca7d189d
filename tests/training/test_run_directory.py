"""A run directory is locked by one job, resumes only its own run, and is not retried forever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from composing import ROOT, plan_of

from mixtrain.config.typed_config import to_yaml
from mixtrain.errors import UserError
from mixtrain.system.status import read_status, write_status
from mixtrain.training.run_directory import (
    RUN_FILES,
    attempts_problem,
    claim,
    directory_problems,
    finished_already,
    record_attempt,
)


def plan(directory: Path, *words: str):
    return plan_of(f"run_dir={directory}", *words)


def left_by(directory: Path, state: str, step: int, *words: str) -> None:
    """Write the files that a run with these overrides leaves."""
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(
        "# a comment\n" + to_yaml(plan(directory, *words).config)
    )
    write_status(directory, state=state, step=step, max_steps=300, reason="")


@pytest.mark.parametrize("name", [*RUN_FILES, "iter_0000003"])
def test_never_refuses_a_directory_that_holds_a_run_with_the_next_free_name(tmp_path, name):
    directory = tmp_path / "taken"
    for each in (directory, tmp_path / "taken-2"):
        each.mkdir()
    (directory / name).mkdir()
    (problem,) = directory_problems(plan(directory, "checkpoint.resume=never"))
    assert (
        problem
        == f"run_dir = {directory} holds a run already; the next free name: run_dir={directory}-3"
    )
    assert list(directory_problems(plan(f"{directory}-3", "checkpoint.resume=never"))) == []


@pytest.mark.parametrize("state", ["running", "stopped", "failed"])
def test_auto_goes_on_with_a_run_that_has_not_finished(tmp_path, state):
    left_by(tmp_path / "run", state, 100)
    assert list(directory_problems(plan(tmp_path / "run", "optimizer.lr=1e-3"))) == []
    assert finished_already(plan(tmp_path / "run")) is None


def test_must_without_any_checkpoint_is_refused_before_anything_starts(tmp_path):
    (problem,) = directory_problems(plan(tmp_path, "checkpoint.resume=must"))
    assert problem.startswith(
        f"checkpoint.resume = must, but run_dir = {tmp_path} holds no checkpoint"
    )
    (tmp_path / "iter_0000001").mkdir()
    assert list(directory_problems(plan(tmp_path, "checkpoint.resume=must"))) == []


def test_a_finished_run_is_not_started_again_and_a_longer_one_is(tmp_path):
    left_by(tmp_path / "run", "finished", 300)
    (tmp_path / "run" / "iter_0000300").mkdir()
    line = finished_already(plan(tmp_path / "run"))
    assert (
        "finished after 300 of 300 steps; a longer one: trainer.max_steps=..., a new one:"
        f" run_dir={tmp_path}/run-2" in line
    )
    assert finished_already(plan(tmp_path / "run", "trainer.max_steps=400")) is None
    assert list(directory_problems(plan(tmp_path / "run", "trainer.max_steps=400"))) == []
    assert list(directory_problems(plan(tmp_path / "run", "trainer.log_every_n_steps=1"))) == []


def test_a_finished_run_that_left_no_checkpoint_is_not_begun_anew_over_its_records(tmp_path):
    left_by(tmp_path / "run", "finished", 300)
    (problem,) = directory_problems(plan(tmp_path / "run", "trainer.max_steps=400"))
    assert problem.endswith("(that one has finished and left no checkpoint to resume from)")


def test_another_warm_up_is_another_run(tmp_path):
    left_by(tmp_path / "run", "finished", 300)
    (problem,) = directory_problems(plan(tmp_path / "run", "optimizer.lr_warmup_steps=50"))
    assert "another optimizer.lr_warmup_steps" in problem


def test_a_finished_run_may_go_on_with_more_steps_and_other_settings(tmp_path):
    left_by(tmp_path / "run", "finished", 300)
    (tmp_path / "run" / "iter_0000300").mkdir()
    assert (
        list(
            directory_problems(plan(tmp_path / "run", "trainer.max_steps=400", "optimizer.lr=1e-3"))
        )
        == []
    )


def test_another_run_than_the_finished_one_is_refused_by_the_keys_that_differ(tmp_path):
    left_by(tmp_path / "run", "finished", 300)
    (problem,) = directory_problems(plan(tmp_path / "run", "optimizer.lr=1e-3", "seed=5"))
    assert problem.endswith(f"run_dir={tmp_path}/run-2 (that one has another seed, optimizer.lr)")


@pytest.mark.parametrize("name", ["status.json", "config.yaml"])
@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"\xff\xfe", b"[1]", b"- x: {", b'{"state": "finished", "step": "x"}']
)
def test_garbage_in_what_a_run_left_is_no_traceback(tmp_path, name, garbage):
    left_by(tmp_path / "run", "finished", 300)
    (tmp_path / "run" / name).write_bytes(garbage)
    list(directory_problems(plan(tmp_path / "run", "seed=5")))
    finished_already(plan(tmp_path / "run"))
    with claim(plan(tmp_path / "run")):
        assert read_status(tmp_path / "run")["state"] == "running"


def test_of_two_processes_one_has_the_directory_and_the_other_is_told_which(tmp_path):
    run = plan(tmp_path / "run")
    with claim(run, "logs"):
        assert (tmp_path / "run" / "logs").is_dir()
        with pytest.raises(
            UserError, match=f"in use by process {os.getpid()} on .*run_dir={tmp_path}/run-2"
        ):
            with claim(run):
                pass
    with claim(run):
        pass


def test_a_lock_left_by_a_killed_process_is_not_in_the_way(tmp_path):
    code = (
        "import time, composing\nfrom mixtrain.training.run_directory import claim\n"
        f"with claim(composing.plan_of('run_dir={tmp_path}/run')):\n"
        "    print('has it', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid} on"):
            with claim(plan(tmp_path / "run")):
                pass
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / ".lock").exists()
    with claim(plan(tmp_path / "run")):
        pass


def test_a_claim_keeps_the_step_and_the_end_of_the_run_before(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    write_status(
        directory, state="failed", step=137, max_steps=300, reason="rank 1 was ended by SIGKILL"
    )
    with claim(plan(directory)):
        status = read_status(directory)
    assert (status["state"], status["step"]) == ("running", 137)
    assert status["before"] == {"state": "failed", "reason": "rank 1 was ended by SIGKILL"}


def run_once(directory: Path, step: int, most: int | None, state: str, reason: str) -> str | None:
    """Start a run at `step` and end it in `state`; return the problem if it is refused."""
    with claim(plan(directory)):
        if problem := attempts_problem(str(directory), step, most):
            return problem
        record_attempt(str(directory), step)
        if state:
            write_status(directory, state=state, step=step, max_steps=300, reason=reason)
    return None


def test_a_run_that_dies_again_and_again_at_one_step_is_stopped_with_a_diagnosis(tmp_path):
    for number in range(3):
        assert (
            run_once(tmp_path, 100, 3, "failed", f"step 13{number}: lm_loss is not finite") is None
        )
    problem = run_once(tmp_path, 100, 3, "failed", "")
    assert problem.startswith(
        "3 runs in a row started at step 100 and none saved a later one; the last ended: step 132:"
    )
    assert problem.endswith("checkpoint.max_attempts=null")
    assert run_once(tmp_path, 100, None, "failed", "once more") is None
    assert len((tmp_path / "attempts.jsonl").read_text().splitlines()) == 4


def test_a_diagnosis_does_not_quote_the_one_before_it(tmp_path):
    assert run_once(tmp_path, 7, 1, "failed", "out of memory") is None
    first = run_once(tmp_path, 7, 1, "", "")
    write_status(
        tmp_path,
        state="failed",
        step=7,
        max_steps=300,
        reason=first,
        before=read_status(tmp_path)["before"],
    )
    assert run_once(tmp_path, 7, 1, "", "") == first and first.count("in a row") == 1


def test_a_child_that_outlives_the_process_does_not_keep_the_lock(tmp_path):
    code = (
        "import os, time, composing\nfrom mixtrain.training.run_directory import claim\n"
        f"with claim(composing.plan_of('run_dir={tmp_path}/run')):\n"
        "    child = os.fork()\n    if not child: time.sleep(30); os._exit(0)\n"
        "    print(child, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        child = int(other.stdout.readline())
        other.send_signal(signal.SIGKILL)
        other.wait(10)
        try:
            with claim(plan(tmp_path / "run")):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_progress_or_a_stop_on_request_begins_the_count_anew(tmp_path):
    ends = "failed", "failed", "failed", "stopped", "failed", "failed", "failed"
    for step, state in zip((0, 0, 100, 100, 100, 100, 100), ends, strict=True):
        assert run_once(tmp_path, step, 3, state, "") is None
    assert "3 runs in a row started at step 100" in run_once(tmp_path, 100, 3, "failed", "")


def test_a_process_that_was_killed_counts_as_well(tmp_path):
    for _ in range(2):
        assert run_once(tmp_path, 0, 2, "", "") is None  # status.json still says running
    assert "2 runs in a row started at step 0" in run_once(tmp_path, 0, 2, "", "")


@pytest.mark.parametrize("garbage", ["{\n", "[]\n", '{"step": "x"}\n', "\0\n"])
def test_garbage_among_the_attempts_ends_the_count(tmp_path, garbage):
    (tmp_path / "attempts.jsonl").write_text(json.dumps({"step": 1, "before": {}}) + "\n" + garbage)
    assert run_once(tmp_path, 1, 1, "failed", "") is None
