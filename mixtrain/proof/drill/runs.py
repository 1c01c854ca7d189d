"""A training run as a process that a drill can watch and break. No torch.

Rule: the run is its own process group, its output goes to a file, and every wait has a time limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mixtrain.checkpoint.directory import steps_in
from mixtrain.launch.local import TRAIN

FAULTY = (sys.executable, "-m", "mixtrain.proof.drill.faulty_rank")
# A model with steps of about 50 ms, on two ranks that share the experts. Runs of any max_steps have
# the same metrics, since the learning-rate schedule is fixed.
SMALL = [
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4",
    "model.num_query_groups=2", "model.kv_channels=16", "model.moe_ffn_hidden_size=64",
    "model.vocab_size=256", "data=mock", "data.seq_length=32", "data.num_workers=0",
    "data.split='100,0,0'", "trainer.micro_batch_size=1", "trainer.global_batch_size=4",
    "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1", "trainer.timeout_minutes=0.2",
    "optimizer.lr_warmup_steps=2", "optimizer.lr_decay_steps=1000", "checkpoint.save_interval=5",
    "checkpoint.keep_last=3", "logging=files",
]  # fmt: skip
TIMING = ("tokens_per_second", "step_seconds")


class DrillRun:
    """Context manager of `python train.py OVERRIDES` in `run_dir`, optionally with a fault."""

    def __init__(self, run_dir: Path, *overrides: str, fault: str = ""):
        self.run_dir = run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.earlier_saves = set(run_dir.glob("iter_*.saving"))  # left by a run that was killed
        self.output = run_dir.parent / f"output_{time.monotonic_ns()}.txt"
        command = FAULTY if fault else TRAIN
        path = os.pathsep.join([str(Path(TRAIN[1]).parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": path, "MIXTRAIN_FAULT": fault}
        # shared by all scenarios: building it takes seconds
        cache = f"data.path_to_cache={run_dir.parent.parent}/cache"
        with open(self.output, "w") as stream:
            self.process = subprocess.Popen(
                [*command, f"run_dir={run_dir}", cache, *SMALL, *overrides],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )

    def __enter__(self) -> DrillRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()  # its ranks end with it
        self.process.wait(30)
        wait(lambda: not self.ranks(), 30)

    def wait(self, seconds: float = 120) -> int | None:
        """Return the exit code; None if the run does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def step(self) -> int:
        """Return the last step that this run has printed, 0 if none."""
        steps = re.findall(r"^ +(\d+) +[\d.]+ ", self.text(), flags=re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def wait_for_step(self, step: int) -> None:
        wait(lambda: self.step() >= step or self.ended(), 120)

    def wait_for_a_save(self) -> None:
        """Wait until this run, not an earlier one that was killed, is writing a checkpoint."""

        def is_saving() -> bool:
            return bool(set(self.run_dir.glob("iter_*.saving")) - self.earlier_saves)

        wait(lambda: is_saving() or self.ended(), 120, pause=0.001)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def ranks(self) -> dict[int, int]:
        """Return {rank: process id} of the ranks that are running."""
        return {int(rank): pid for pid, rank in processes("RANK", str(self.run_dir)).items()}

    def kill(self, rank: int | None, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank, or to the launcher (None)."""
        target = self.process.pid if rank is None else self.ranks().get(rank)
        with contextlib.suppress(ProcessLookupError):  # it has already ended
            if target:
                os.kill(target, number)


def processes(variable: str, run_dir: str) -> dict[int, str]:
    """Return {process id: value of an environment variable} of the ranks that log to run_dir."""
    values = {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit():
                continue
            if not os.readlink(entry / "fd" / "2").startswith(f"{run_dir}/logs/"):
                continue
            lines = (entry / "environ").read_bytes().split(b"\0")
            variables = dict(line.split(b"=", 1) for line in lines if line)
            values[int(entry.name)] = variables[variable.encode()].decode()
        except (OSError, KeyError, ValueError):
            continue  # it has ended, or belongs to another user
    return values


def wait(until: Callable[[], object], seconds: float, pause: float = 0.02) -> None:
    """Wait until the condition is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {seconds:.0f} s")
        time.sleep(pause)


def records(run_dir: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without timings and without an incomplete last line."""
    path = run_dir / "metrics.jsonl"
    complete = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        complete.append({key: value for key, value in record.items() if key not in TIMING})
    return complete


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint, valid or not; 0 if there is none."""
    return next(iter(steps_in(run_dir)), 0)
