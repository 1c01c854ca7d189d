"""train.py as it is typed: real processes, real signals. Every wait is bounded, every process group is ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtrain.status import read_status

ROOT = Path(__file__).resolve().parent.parent
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
    """A command in a process group of its own, its output in a file."""

    def __init__(self, folder: Path, *words: str):
        self.output = folder / "output.txt"
        with open(self.output, "w") as stream:
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "COLUMNS": "100"},
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
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

    def wait_for_step(self, run_dir: Path, step: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while (read_status(run_dir) or {"step": 0})["step"] < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()[-2000:]
            time.sleep(0.1)


def train(folder: Path, *overrides: str) -> Command:
    return Command(folder, sys.executable, "train.py", f"run_dir={folder}/run", *overrides)


def lm_losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record["lm_loss"] for record in map(json.loads, lines) if "lm_loss" in record]


def ranks_of(command: Command) -> dict[int, int]:
    """rank -> process id of the ranks that a launcher has started."""
    found = {}
    for child in Path(f"/proc/{command.process.pid}/task/{command.process.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found[int(next(v for v in variables if v.startswith(b"RANK=")).split(b"=")[1])] = int(child)
    return found


def test_the_default_run_shortened_learns_on_two_ranks(tmp_path):
    with train(
        tmp_path, f"data.path_to_cache={tmp_path}/cache", "trainer.max_steps=40", "trainer.limit_val_batches=2"
    ) as run:
        assert run.wait() == 0, run.text()
    text, losses = run.text(), lm_losses(tmp_path)
    assert "2 on 1 node of 2 (cpu)" in text and "EP 2" in text
    assert "sha256" in text and "unigram entropy" in text
    assert losses[0] == pytest.approx(8.33, abs=0.1) and losses[-1] < losses[0] - 2
    assert read_status(tmp_path / "run")["state"] == "finished"

    with train(tmp_path) as again:  # the directory is taken now
        assert again.wait(30) == 2
    assert f"run_dir={tmp_path}/run-2" in again.text() and "Traceback" not in again.text()
    assert read_status(tmp_path / "run")["state"] == "finished"


def test_a_recipe_shrunk_to_a_laptop_trains_on_eight_ranks(tmp_path):
    words = ["+recipe=mixtral_8x7b_ep8", "+shrink=laptop", "trainer.max_steps=5", "trainer.log_every_n_steps=5"]
    with train(tmp_path, *words) as run:
        assert run.wait() == 0, run.text()
    assert "8 on 1 node of 8 (cpu)" in run.text() and "bf16" in run.text() and "recompute full" in run.text()
    assert len(list((tmp_path / "run" / "logs").glob("rank_*.log"))) == 8
    assert read_status(tmp_path / "run")["step"] == 5


def test_torchrun_starts_the_ranks_as_well(tmp_path):
    words = [f"run_dir={tmp_path}/run", *SMALL, "trainer.max_steps=2", "checkpoint=none"]
    with socket.socket() as probe:  # torchrun's default port may be taken on a shared machine
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    with Command(tmp_path, *torchrun, "train.py", *words) as run:
        assert run.wait() == 0, run.text()
    assert run.text().count("experts on ranks") == 1  # the plan is printed once
    assert read_status(tmp_path / "run")["state"] == "finished"


def test_sigterm_to_the_launcher_ends_the_step_saves_and_exits_0(tmp_path):
    with train(tmp_path, *SMALL, "trainer.max_steps=100000", "trainer.val_check_interval=100000") as run:
        run.wait_for_step(tmp_path / "run", 2)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0, run.text()
    status = read_status(tmp_path / "run")
    assert status["state"] == "stopped"
    assert (tmp_path / "run" / f"iter_{status['step']:07d}").is_dir()
    assert not ranks_left(tmp_path)


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path):
    with train(tmp_path, *SMALL, "trainer.max_steps=100000", "trainer.val_check_interval=100000") as run:
        run.wait_for_step(tmp_path / "run", 2)
        os.kill(ranks_of(run)[1], signal.SIGKILL)
        assert run.wait(60) == 1
    assert "rank 1 was ended by SIGKILL" in run.text()
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and "rank 1" in status["reason"]
    assert not ranks_left(tmp_path)


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path):
    with train(tmp_path, *SMALL, "trainer.max_steps=100000", "trainer.val_check_interval=100000") as run:
        run.wait_for_step(tmp_path / "run", 2)
        run.process.kill()
        run.wait(10)
        deadline = time.monotonic() + 20
        while ranks_left(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not ranks_left(tmp_path)


def ranks_left(folder: Path) -> list[str]:
    """Processes whose command line names this test's run directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"run_dir={folder}/run" in words and state != "Z":
                found.append(words.replace("\0", " "))
    return found
