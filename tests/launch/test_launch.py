"""train.py as users run it: real processes and signals; waits are bounded, groups are ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from composing import ROOT

from mixtrain.system.status import read_status

SMALL = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.kv_channels=16",
    "model.moe_ffn_hidden_size=64",
    "data=mock",
    "data.seq_length=32",
    "data.num_workers=0",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=1",
]


class Command:
    """A command in its own process group, with its output in a file."""

    def __init__(self, folder: Path, *command: str):
        self.output = folder / "output.txt"
        with open(self.output, "w") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT / "tests")},
                preexec_fn=hear_ctrl_c,
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def wait(self, seconds: float = 200) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s:\n{self.text()[-2000:]}") from None

    def text(self) -> str:
        return self.output.read_text()

    def wait_until(self, condition, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()[-2000:]
            time.sleep(0.01)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        self.wait_until(lambda: (read_status(run_dir) or {"step": 0})["step"] >= step, 120)


def hear_ctrl_c() -> None:
    """Reset SIGINT: a script's background job ignores it, and so would every child."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def train(folder: Path, *overrides: str) -> Command:
    return Command(folder, sys.executable, "train.py", f"run_dir={folder}/run", *overrides)


def launch(folder: Path, rank: str) -> Command:
    """Run only the launcher, with two ranks that run the code `rank` instead of train.py."""
    start = (
        f"mixtrain.launch.local.start(composing.plan_of('run_dir={folder}/run'),"
        f" (sys.executable, '-c', {rank!r}))"
    )
    return Command(
        folder,
        sys.executable,
        "-c",
        f"import sys, composing, mixtrain.launch.local; sys.exit({start})",
    )


def lm_losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record["lm_loss"] for record in map(json.loads, lines) if "lm_loss" in record]


def ranks_of(command: Command) -> dict[int, int]:
    """Return rank -> process id of a launcher's ranks."""
    found = {}
    for child in (
        Path(f"/proc/{command.process.pid}/task/{command.process.pid}/children").read_text().split()
    ):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found[int(next(v for v in variables if v.startswith(b"RANK=")).split(b"=")[1])] = int(child)
    return found


@pytest.mark.long
def test_the_default_run_shortened_learns_on_two_ranks(tmp_path):
    overrides = [
        f"data.path_to_cache={tmp_path}/cache",
        "trainer.max_steps=40",
        "trainer.limit_val_batches=2",
    ]
    with train(tmp_path, *overrides) as run:
        assert run.wait() == 0, run.text()
    text = run.text()
    losses = lm_losses(tmp_path)
    assert "2 on 1 node of 2 (cpu)" in text and "EP 2" in text
    assert "sha256" in text and "unigram entropy" in text
    assert losses[0] == pytest.approx(8.33, abs=0.1) and losses[-1] < losses[0] - 2
    assert read_status(tmp_path / "run")["state"] == "finished"

    with train(tmp_path, *overrides) as again:  # all steps are done
        assert again.wait(30) == 0
    assert "finished after 40 of 40 steps" in again.text() and lm_losses(tmp_path) == losses
    with train(tmp_path, *overrides, "optimizer.lr=1e-3") as other:
        assert other.wait(30) == 2
    assert f"run_dir={tmp_path}/run-2 (that one has another optimizer.lr)" in other.text()
    assert read_status(tmp_path / "run")["state"] == "finished"


@pytest.mark.long
def test_a_recipe_shrunk_to_a_laptop_trains_on_eight_ranks(tmp_path):
    overrides = [
        "+recipe=mixtral_8x7b_ep8",
        "+shrink=laptop",
        "trainer.max_steps=5",
        "trainer.log_every_n_steps=5",
    ]
    with train(tmp_path, *overrides) as run:
        assert run.wait() == 0, run.text()
    assert (
        "8 on 1 node of 8 (cpu)" in run.text()
        and "bf16" in run.text()
        and "recompute full" in run.text()
    )
    assert len(list((tmp_path / "run" / "logs").glob("rank_*.log"))) == 8
    status = read_status(tmp_path / "run")
    assert status["step"] == 5
    # the ranks know the recipe
    assert status["changed_mathematics"] == ["trainer.max_steps = 5 (recipe: 20)"]


def test_torchrun_starts_the_ranks_as_well(tmp_path):
    overrides = [f"run_dir={tmp_path}/run", *SMALL, "trainer.max_steps=2", "checkpoint=none"]
    with socket.socket() as probe:  # torchrun's default port may be taken on a shared machine
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        port,
    ]
    with Command(tmp_path, *torchrun, "train.py", *overrides) as run:
        assert run.wait() == 0, run.text()
    assert run.text().count("experts on ranks") == 1  # the plan is printed once
    assert read_status(tmp_path / "run")["state"] == "finished"


@pytest.mark.long
def test_the_jobs_of_a_sweep_run_one_after_the_other_each_on_ranks_of_its_own(tmp_path):
    overrides = [
        "--multirun",
        "seed=1,2",
        f"run_dir='{tmp_path}/${{hydra:job.num}}'",
        *SMALL,
        "trainer.max_steps=2",
    ]
    with Command(
        tmp_path, sys.executable, "train.py", *overrides, f"data.path_to_cache={tmp_path}/cache"
    ) as run:
        assert run.wait() == 0, run.text()
    assert [read_status(tmp_path / number)["state"] for number in "01"] == ["finished", "finished"]
    assert f"job 2 of 2, in {tmp_path}/1" in run.text()


def test_sigterm_to_the_launcher_ends_the_step_saves_and_exits_0(tmp_path):
    with train(
        tmp_path, *SMALL, "trainer.max_steps=100000", "trainer.val_check_interval=100000"
    ) as run:
        run.wait_for_step(tmp_path / "run", 2)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0, run.text()
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"]) == ("stopped", "stopped by SIGTERM")
    assert (tmp_path / "run" / f"iter_{status['step']:07d}").is_dir()
    assert not ranks_left(tmp_path)


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path):
    with train(
        tmp_path, *SMALL, "trainer.max_steps=100000", "trainer.val_check_interval=100000"
    ) as run:
        run.wait_for_step(tmp_path / "run", 2)
        os.kill(ranks_of(run)[1], signal.SIGKILL)
        assert run.wait(60) == 1
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed"
    assert re.fullmatch(r"rank 1 was ended by SIGKILL in step \d+ \(\w+\)", status["reason"])
    assert f"mixtrain: {status['reason']}; its log is" in run.text()
    assert not ranks_left(tmp_path)


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path):
    with train(
        tmp_path, *SMALL, "trainer.max_steps=100000", "trainer.val_check_interval=100000"
    ) as run:
        run.wait_for_step(tmp_path / "run", 2)
        run.process.kill()
        run.wait(60)
        wait_for_no_ranks(tmp_path, 20)


def test_a_launcher_killed_while_its_ranks_import_torch_leaves_none_behind(tmp_path):
    with train(
        tmp_path, *SMALL, "trainer.max_steps=100000", "trainer.val_check_interval=100000"
    ) as run:
        run.wait_until(lambda: ranks_left(tmp_path))
        run.process.kill()
        run.wait(60)
        wait_for_no_ranks(tmp_path, 4)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ctrl_c_while_the_ranks_start_ends_them_and_exits_0(tmp_path):
    with train(tmp_path, *SMALL, "trainer.max_steps=100000") as run:
        run.wait_until(lambda: ranks_left(tmp_path))
        run.process.send_signal(signal.SIGINT)
        assert run.wait(30) == 0, run.text()
    assert "stopped before the first step" in run.text() and "Traceback" not in run.text()
    assert read_status(tmp_path / "run")["state"] == "stopped"
    assert not ranks_left(tmp_path)


def test_ctrl_c_before_there_is_a_run_is_one_line(tmp_path):
    with train(tmp_path, *SMALL) as run:
        # the first action of train.py
        run.wait_until(lambda: catches(run.process.pid, signal.SIGTERM))
        run.process.send_signal(signal.SIGINT)
        assert run.wait(60) == 0
    assert run.text() == "mixtrain: stopped before a run was started\n"
    assert not (tmp_path / "run").exists()


def test_of_two_runs_that_start_at_once_one_gets_the_directory(tmp_path):
    overrides = [
        sys.executable,
        "train.py",
        f"run_dir={tmp_path}/run",
        *SMALL,
        "trainer.max_steps=2",
        "checkpoint=none",
    ]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with Command(folders[0], *overrides) as first, Command(folders[1], *overrides) as second:
        runs = {run.wait(): run.text() for run in (first, second)}
    assert sorted(runs) == [0, 2]
    in_use = rf"run_dir = {tmp_path}/run is in use by process \d+ on .* since "
    assert re.search(f"{in_use}.*run_dir={tmp_path}/run-2", runs[2])
    assert "Traceback" not in runs[2]
    assert read_status(tmp_path / "run")["state"] == "finished"


def test_the_ranks_are_handed_the_plan_and_do_not_compose_it_again(tmp_path):
    """Composed again, ${now:%f} would be another microsecond."""
    moment = "run_dir='" + str(tmp_path / "runs") + "/${now:%f}'"
    with Command(
        tmp_path,
        sys.executable,
        "train.py",
        moment,
        *SMALL,
        "trainer.max_steps=1",
        "checkpoint=none",
    ) as run:
        assert run.wait() == 0, run.text()
    (directory,) = (tmp_path / "runs").iterdir()
    assert (
        read_status(directory)["state"] == "finished"
        and (directory / "logs" / "rank_1.log").exists()
    )


# The launcher alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_every_signal_that_asks_for_the_end_reaches_the_ranks_as_one_they_handle(tmp_path, number):
    rank = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('asked'),"
        " sys.exit()));"
    )
    with launch(tmp_path, rank + "print('ready', flush=True); time.sleep(60)") as run:
        run.wait_until(lambda: "ready" in run.text() and "ready" in log_of(tmp_path, 1))
        run.process.send_signal(number)
        assert run.wait(60) == 0, run.text()
    assert (
        "stopping after this step" in run.text()
        and "asked" in run.text()
        and "asked" in log_of(tmp_path, 1)
    )


def test_a_second_ctrl_c_ends_the_run_at_once_and_a_second_hangup_does_not(tmp_path):
    rank = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready',"
        " flush=True);"
    )
    with launch(tmp_path, rank + "time.sleep(60)") as run:  # a long step
        run.wait_until(lambda: "ready" in run.text() and "ready" in log_of(tmp_path, 1))
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGINT):
            run.process.send_signal(number)
            time.sleep(0.3)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGINT)
        assert run.wait(60) == 0
    assert run.text().endswith("mixtrain: stopped at once on request, without a checkpoint\n")
    assert read_status(tmp_path / "run")["state"] == "stopped"
    assert not ranks_left(tmp_path)


def test_a_rank_that_hangs_is_named_and_not_only_the_one_that_waited_for_it(tmp_path):
    rank = (
        "import os, signal, sys; os.environ['RANK'] == '1' and os.kill(os.getpid(),"
        " signal.SIGSTOP);"
    )
    with launch(tmp_path, rank + "sys.exit('RuntimeError: Timed out')") as run:
        assert run.wait(60) == 1
    assert (
        "mixtrain: rank 1 did not answer: stopped by SIGSTOP\nmixtrain: rank 0 failed" in run.text()
    )
    reason = read_status(tmp_path / "run")["reason"]
    assert reason.startswith(
        "rank 1 did not answer: stopped by SIGSTOP; rank 0 failed: RuntimeError"
    )
    assert not ranks_left(tmp_path)


def test_a_stopped_rank_is_named_with_its_step_and_every_ranks_stack_is_shown(tmp_path):
    overrides = [
        *SMALL,
        "trainer.max_steps=100000",
        "trainer.val_check_interval=100000",
        "trainer.timeout_minutes=0.05",
    ]
    with train(tmp_path, *overrides) as run:
        run.wait_for_step(tmp_path / "run", 2)
        os.kill(ranks_of(run)[1], signal.SIGSTOP)
        assert run.wait(60) == 1
    assert re.search(
        r"mixtrain: rank 1 did not answer in step \d+ \(\w+\): stopped by SIGSTOP", run.text()
    )
    for rank in (0, 1):
        assert re.search(
            rf"  rank {rank} in step \d+ \(\w+\), innermost first.*rank_{rank}.log:\n    File ",
            run.text(),
        )
        assert "stands still" in log_of(tmp_path, 0) and "train_step" in log_of(tmp_path, rank)
    assert all(len(line) < 250 for line in run.text().splitlines())
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and status["reason"].startswith(
        "rank 1 did not answer in step"
    )
    assert not ranks_left(tmp_path)


HANGS = """
import os, sys, time, composing
from mixtrain.training.watchdog import Watchdog, heartbeat
def collective(): time.sleep(60)
def forgotten_loop():
    while True: time.sleep(0.01)
rank = int(os.environ['RANK'])
code = compile('def waits(f): f()', '/torch/distributed/c10d.py', 'exec'); exec(code)
with Watchdog(rank, 1 / 60, os.environ['MIXTRAIN_FOLDER'], lambda words: None):
    heartbeat('forward', 7)
    waits(collective) if rank == 0 else forgotten_loop()
"""


def test_the_rank_that_does_not_wait_for_others_is_the_one_that_hangs(tmp_path):
    with launch(tmp_path, HANGS) as run:
        assert run.wait(30) == 1
    assert "mixtrain: rank 1 did not answer in step 7 (forward)" in run.text()
    assert "forgotten_loop" in run.text() and "collective" in run.text()


def test_a_rank_killed_before_the_first_step_ends_the_run_in_seconds(tmp_path):
    rank = (
        "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(),"
        " signal.SIGKILL);"
    )
    started = time.monotonic()
    with launch(tmp_path, rank + "time.sleep(60)") as run:
        assert run.wait(40) == 1
    assert time.monotonic() - started < 15
    assert "rank 1 was ended by SIGKILL" in run.text() and "did not answer" not in run.text()


def log_of(folder: Path, rank: int) -> str:
    log = folder / "run" / "logs" / f"rank_{rank}.log"
    return log.read_text() if log.exists() else ""


def catches(process: int, number: int) -> bool:
    """Return whether a process has its own handler for a signal."""
    caught = next(
        v
        for v in Path(f"/proc/{process}/status").read_text().splitlines()
        if v.startswith("SigCgt")
    )
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def wait_for_no_ranks(folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while ranks_left(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks_left(folder)


def ranks_left(folder: Path) -> list[str]:
    """Return ranks of folder/run and their helpers: processes whose stderr is one of its logs."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "2").startswith(
                f"{folder}/run/logs/"
            ):
                found.append(entry.name)
        except OSError:
            continue  # it has ended
    return found
