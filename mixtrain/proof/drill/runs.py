"""A training run as a process that can be watched and broken. No torch.

Rule: it is a process group of its own, its output goes to a file, and every wait has an end.
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
# A model for which a step takes some 50 ms, on two ranks that share the experts; runs of any length
# are one run.
SMALL = [
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.kv_channels=16", "model.moe_ffn_hidden_size=64", "model.vocab_size=256", "data=mock", "data.seq_length=32",
    "data.num_workers=0", "data.split='100,0,0'", "trainer.micro_batch_size=1", "trainer.global_batch_size=4",
    "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1", "trainer.timeout_minutes=0.2",
    "optimizer.lr_warmup_steps=2", "optimizer.lr_decay_steps=1000", "checkpoint.save_interval=5",
    "checkpoint.keep_last=3", "logging=files",
]  # fmt: skip
TIMING = ("tokens_per_second", "step_seconds")


class Run:
    """`python train.py WORDS` in `run_dir`, or the same with a fault in its ranks. Use as a context manager."""

    def __init__(self, run_dir: Path, *words: str, fault: str = ""):
        self.run_dir = run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.left = set(run_dir.glob("iter_*.saving"))  # by a run that was killed
        self.output = run_dir.parent / f"output_{time.monotonic_ns()}.txt"
        command = FAULTY if fault else TRAIN
        path = os.pathsep.join([str(Path(TRAIN[1]).parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": path, "MIXTRAIN_FAULT": fault}
        # one for all scenarios: it takes seconds to make
        cache = f"data.path_to_cache={run_dir.parent.parent}/cache"
        with open(self.output, "w") as stream:
            self.process = subprocess.Popen(
                [*command, f"run_dir={run_dir}", cache, *SMALL, *words],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()  # its ranks end with it
        self.process.wait(30)
        wait(lambda: not self.ranks(), 30)

    def wait(self, seconds: float = 120) -> int | None:
        """The exit code; None if it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def step(self) -> int:
        """The last step that it has printed: this run's own, whatever those before it have left."""
        found = re.findall(r"^ +(\d+) +[\d.]+ ", self.text(), flags=re.MULTILINE)
        return int(found[-1]) if found else 0

    def wait_for_step(self, step: int) -> None:
        wait(lambda: self.step() >= step or self.ended(), 120)

    def wait_for_a_save(self) -> None:
        """Until this run, not one that was killed before it, is writing a checkpoint."""
        wait(
            lambda: set(self.run_dir.glob("iter_*.saving")) - self.left or self.ended(),
            120,
            pause=0.001,
        )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def ranks(self) -> dict[int, int]:
        """rank -> process id, of the ranks that are there."""
        return {int(found): pid for pid, found in processes("RANK", str(self.run_dir)).items()}

    def kill(self, who: int | None, number: int = signal.SIGKILL) -> None:
        """A signal to a rank, or to the launcher (None)."""
        target = self.process.pid if who is None else self.ranks().get(who)
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            if target:
                os.kill(target, number)


def processes(variable: str, run_dir: str) -> dict[int, str]:
    """process id -> the value of an environment variable, of the ranks whose log is in run_dir."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "2").startswith(
                f"{run_dir}/logs/"
            ):
                variables = dict(
                    line.split(b"=", 1)
                    for line in (entry / "environ").read_bytes().split(b"\0")
                    if line
                )
                found[int(entry.name)] = variables[variable.encode()].decode()
        except (OSError, KeyError, ValueError):
            continue  # it has ended, or is another's
    return found


def wait(until: Callable[[], object], seconds: float, pause: float = 0.02) -> None:
    """Wait for something; TimeoutError if it does not come."""
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {seconds:.0f} s")
        time.sleep(pause)


def records(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock decides; a line that is not whole yet is left out."""
    path = run_dir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append({key: value for key, value in record.items() if key not in TIMING})
    return found


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, valid or not; 0 if there is none."""
    return next(iter(steps_in(run_dir)), 0)
