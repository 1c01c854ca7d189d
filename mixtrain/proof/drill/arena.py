"""What a scenario of the fault drill works with, and what it returns."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import NamedTuple

from mixtrain.errors import FINISHED
from mixtrain.proof.drill.runs import DrillRun, records

REFERENCE_STEPS = 320  # of the undisturbed run: as many as any scenario needs
SHORT = "trainer.max_steps=20"
KILLS = 20


class Outcome(NamedTuple):
    """The result of a scenario; `lost` is the maximum number of repeated steps, if any could be."""

    ok: bool
    message: str
    lost: int | None = None


class Arena:
    """What a scenario works with: a folder, the reference run, and seeded random numbers."""

    def __init__(self, folder: Path, reference: Path, seed: int, kills: int):
        self.run_dir = folder / "run"
        self.reference = reference
        self.kills = kills
        self.random = random.Random(seed)

    def run(self, *overrides: str, fault: str = "") -> DrillRun:
        return DrillRun(self.run_dir, *overrides, fault=fault)

    def finish(self, *overrides: str, fault: str = "") -> DrillRun:
        """Run to the end, resuming from what is in the run directory."""
        with self.run(*overrides, fault=fault) as run:
            run.code = run.wait(180)
        return run

    def disturb(self, rank: int | None, number: int, seconds: float = 60) -> DrillRun:
        """Send a signal to a rank, or to the launcher (None), after step 7; wait for the end."""
        with self.run(SHORT) as run:
            run.wait_for_step(7)
            run.kill(rank, number)
            started = time.monotonic()
            run.code = run.wait(seconds)
            run.seconds = time.monotonic() - started
        return run

    def resume(self, *overrides: str) -> Outcome:
        return self.check_resumed(self.finish(*(overrides or (SHORT,))))

    def has_reference_metrics(self, steps: int) -> bool:
        """Whether there are metrics of exactly `steps` steps, bit-identical to the reference's."""
        metrics = [record for record in records(self.run_dir) if "lm_loss" in record]
        return len(metrics) == steps and metrics == records(self.reference)[:steps]

    def check_resumed(self, run: DrillRun) -> Outcome:
        """Check a run that resumed and ended at step 20: its metrics must equal the reference's."""
        is_same = self.has_reference_metrics(20)
        message = f"exit {run.code}, {'metrics identical' if is_same else 'metrics DIFFER'}"
        return Outcome(run.code == FINISHED and is_same, message)


def reference(folder: Path) -> Path:
    """Train the undisturbed run."""
    with DrillRun(folder / "run", f"trainer.max_steps={REFERENCE_STEPS}", "checkpoint=none") as run:
        if run.wait(600) != FINISHED:
            raise RuntimeError(f"the reference run failed:\n{run.text()[-2000:]}")
    return folder / "run"
