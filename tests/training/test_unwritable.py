"""If nothing can be written, the last line says why, which checkpoint is valid, what to type."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from composing import ROOT, plan_of
from tiny_disks import fill, tiny_disk

from mixtrain.checkpoint import directory, integrity
from mixtrain.checkpoint.write_errors import Unwritable, recovery_advice
from mixtrain.config.plan import Plan
from mixtrain.errors import FAULT, UserError
from mixtrain.launch import local
from mixtrain.system.status import read_status, write_status
from mixtrain.training.logs import Logs

SAID = "mixtrain: step 3: lm_loss is not finite"
RESUME = "run the same command again to resume from it"


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    """A rank here is `python -c`, which imports from the current directory."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")


def run_of(folder: Path, *words: str) -> Plan:
    """Return the plan of a run with a complete checkpoint of step 2 and half of step 4's."""
    plan = plan_of(
        f"run_dir={folder}/run",
        "trainer.devices=1",
        "parallel.expert_model_parallel_size=1",
        *words,
    )
    written = directory.saving_path(directory.path_of(plan.config.run_dir, 2))
    written.mkdir(parents=True)
    (written / "__0_0.distcp").write_text("weights")
    integrity.write_manifest(written, integrity.describe([written / "__0_0.distcp"]))
    directory.commit(written, 2)
    half = directory.saving_path(directory.path_of(plan.config.run_dir, 4))
    half.mkdir()
    (half / "__0_0.distcp").write_text("weigh")
    return plan


def launched(plan: Plan, rank: str, capfd) -> tuple[int, list[str]]:
    """Run `rank`, print SAID and fail on a launcher's one rank: (exit code, stderr lines)."""
    fails = f"print({SAID!r}, file=sys.stderr)\nsys.exit(1)"
    code = f"import os, sys\nrun = {plan.config.run_dir!r}\n{rank}\n{fails}"
    exit_code = local.start(plan, (sys.executable, "-c", code))
    lines = capfd.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines), lines
    return exit_code, lines


def test_a_log_on_a_full_disk_loses_no_word_and_the_status_is_told_all_the_same(tmp_path, capfd):
    with tiny_disk(tmp_path, "200k") as disk:
        plan = run_of(disk)
        rank = (
            "from mixtrain.system.streams import make_tolerant; from tiny_disks import fill;"
            " make_tolerant(); fill(run)"
        )
        code, lines = launched(plan, rank, capfd)
        assert (code, lines) == (FAULT, [SAID])
        assert (disk / "run" / "logs" / "rank_0.log").read_text() == ""
        status = read_status(disk / "run")
        assert (status["state"], status["reason"]) == ("failed", SAID.removeprefix("mixtrain: "))
        # half a checkpoint is not what keeps the disk full
        assert not list((disk / "run").glob("*.saving"))


def test_a_status_that_a_read_only_disk_does_not_take_is_said_with_what_to_type(tmp_path, capfd):
    plan = run_of(tmp_path)
    with tiny_disk(tmp_path, "4k"):  # may this process mount at all?
        pass
    rank = (
        "from tiny_disks import mount; mount('--bind', run, run); mount('-o',"
        " 'remount,ro,bind', run)"
    )
    try:
        code, (line,) = launched(plan, rank, capfd)
    finally:
        subprocess.run(["umount", "-l", plan.config.run_dir], check=True)
    unwritten = "status.json cannot be written (Read-only file system) and does not say so"
    assert code == FAULT
    assert line == f"{SAID}; {unwritten}; iter_0000002 is complete: make it writable and {RESUME}"


def test_a_run_directory_that_is_deleted_while_it_runs_is_said_and_that_its_checkpoints_are_gone(
    tmp_path, capfd
):
    plan = run_of(tmp_path)
    code, (line,) = launched(plan, "import shutil; shutil.rmtree(run)", capfd)
    assert code == FAULT and line.startswith(
        f"{SAID}; status.json cannot be written (No such file or directory)"
    )
    assert line.endswith(
        f"{tmp_path}/run is gone, with every checkpoint in it; the same command starts from step 0"
    )
    assert not (tmp_path / "run").exists()


def test_a_stop_on_request_that_cannot_be_written_down_is_no_success(tmp_path, capfd):
    plan = run_of(tmp_path)
    rank = (
        "import shutil, signal, time; shutil.rmtree(run); os.kill(os.getppid(),"
        " signal.SIGTERM); time.sleep(60)"
    )
    code, lines = launched(plan, rank, capfd)
    assert code == FAULT
    assert lines[-1].startswith(
        "mixtrain: stopped before the first step; status.json cannot be written (No such"
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"step": "x"}'])
def test_a_status_that_cannot_be_read_is_replaced(tmp_path, capfd, text):
    plan = run_of(tmp_path)
    code, lines = launched(plan, f"open(run + '/status.json', 'w').write({text!r})", capfd)
    assert (code, lines) == (FAULT, [SAID])
    assert read_status(tmp_path / "run") == {
        "state": "failed",
        "step": 0,
        "max_steps": 300,
        "reason": SAID.removeprefix("mixtrain: "),
    }


def test_ranks_that_cannot_be_started_are_a_line_and_the_run_has_failed(tmp_path, capfd):
    plan = run_of(tmp_path)
    log = tmp_path / "run" / "logs" / "rank_0.log"
    log.mkdir(parents=True)  # as good as a disk with no room for another file
    with pytest.raises(UserError, match=f"the ranks could not be started: {log}: Is a directory"):
        local.start(plan)
    assert read_status(tmp_path / "run")["state"] == "failed"


def test_the_launchers_folder_goes_with_it_or_with_the_next_one(tmp_path, capfd):
    rank = "print(sorted(os.listdir(os.environ['MIXTRAIN_FOLDER'])), file=sys.stderr, flush=True)"
    plan = run_of(tmp_path)
    launched(plan, rank, capfd)
    assert "'owner', 'plan.pickle'" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()


# A rank's records


def test_a_full_disk_takes_another_status_in_the_place_of_the_last_one(tmp_path):
    with tiny_disk(tmp_path, "100k") as disk:
        write_status(disk, state="running", step=100, max_steps=300, reason="x" * 200)
        fill(disk)
        write_status(disk, state="failed", step=7, max_steps=300, reason="short")
        assert (read_status(disk)["reason"], read_status(disk)["step"]) == ("short", 7)
        write_status(disk, state="failed", step=8, max_steps=300, reason="y" * 2000)
        assert read_status(disk)["reason"] == "y" * 2000
        with pytest.raises(OSError, match="No space left"):
            # more than a block
            write_status(disk, state="failed", step=9, max_steps=300, reason="z" * 5000)
        assert read_status(disk)["step"] == 8 and sorted(os.listdir(disk)) == [
            "filler",
            "status.json",
        ]


def test_a_record_that_cannot_be_written_is_named_and_closing_it_is_no_other_error(
    tmp_path, monkeypatch
):
    plan = plan_of(f"run_dir={tmp_path}/run", "logging=files")
    with Logs(plan, True, "") as logs:
        logs.begin(0)
        metrics = logs.sinks[0]
        metrics.file.close()
        metrics.file = open("/dev/full", "w", buffering=1)
        with pytest.raises(
            Unwritable, match=r"run/metrics.jsonl cannot be written \(No space left on device\)"
        ):
            logs.validation(1, val_loss=2.5)
        (tmp_path / "run").rename(tmp_path / "moved")
        said = f"{tmp_path}/run/status.json.tmp cannot be written (No such file or directory)"
        assert logs.record_failure("lm_loss is not finite") == said
        with pytest.raises(Unwritable):
            logs.status("running", "")


def test_what_to_type_follows_from_what_is_there(tmp_path):
    def said(number: int, *words: str) -> str:
        return recovery_advice(plan_of(f"run_dir={tmp_path}/run", *words), number)

    full = 28
    read_only = 30
    large = 27
    assert "run is gone" in said(full)
    run_of(tmp_path)
    assert said(full) == f"iter_0000002 is complete: free some space and {RESUME}"
    assert said(read_only) == f"iter_0000002 is complete: make it writable and {RESUME}"
    assert "raise the limit of a file's size (ulimit -f) and run" in said(large)
    assert "run the same command with checkpoint.resume=auto to" in said(
        full, "checkpoint.resume=never"
    )
    (tmp_path / "run" / "iter_0000002" / "__0_0.distcp").write_text("half")
    assert (
        said(0)
        == "there is no complete checkpoint: run the same command again to start from step 0"
    )


def test_a_print_that_a_full_disk_does_not_take_ends_nothing(tmp_path):
    code = (
        "import sys; from mixtrain.system.streams import make_tolerant; make_tolerant()\n"
        "for _ in range(3): print('lost'); print('lost', file=sys.stderr)\n"
        f"open({str(tmp_path / 'went_on')!r}, 'w')"
    )
    with open("/dev/full", "w") as full:
        assert (
            subprocess.run(
                [sys.executable, "-c", code], stdout=full, stderr=full, check=False
            ).returncode
            == 0
        )
    assert (tmp_path / "went_on").exists()
