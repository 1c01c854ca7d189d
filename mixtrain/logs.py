"""What a run says and leaves behind: the terminal, metrics.jsonl, TensorBoard, status.json, report.png.

Rule: rank 0 writes, the others are given an object that does nothing. One line per logged step, units in the header.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mixtrain import figure
from mixtrain.plan import Plan
from mixtrain.report import banners, changed_mathematics, render, tags
from mixtrain.status import write_status

COLUMNS = {"step": 7, "lm_loss": 9, "val_loss": 9, "grad_norm": 9, "lr": 9, "balance": 8, "tokens/s": 9, "s/step": 8}
HEADER = " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())


class Logs:
    """The records of one run. Use as a context manager; `writes` is false on every rank but the first."""

    def __init__(self, plan: Plan, writes: bool, config_yaml: str):
        self.plan, self.writes = plan, writes
        self.directory = Path(plan.config.run_dir)
        self.steps_done, self.last_val_loss = 0, None
        if not writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        head = "".join(f"# {line}\n" for line in self._changes())
        (self.directory / "config.yaml").write_text(head + config_yaml)
        (self.directory / "plan.txt").write_text(render(plan) + "\n")
        self.metrics = open(self.directory / "metrics.jsonl", "w", buffering=1)
        self.tensorboard = _tensorboard(self.directory) if plan.config.logging.tensorboard else None
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
        self.progress = _progress(self.console)
        self.task = self.progress.add_task("training", total=plan.config.trainer.max_steps)
        self.status("running", "")

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self.progress.stop()
            self.metrics.close()
            if self.tensorboard:
                self.tensorboard.close()

    def say(self, line: str) -> None:
        if self.writes:
            self.console.print(line, soft_wrap=True, markup=False)
            sys.stdout.flush()

    def start(self) -> None:
        """Before the first step: the header, and the bar where there is a terminal."""
        for line in [*banners(self.plan), *self._changes()]:
            self.say(line)
        self.say(HEADER)
        if self.writes:
            self.progress.start()

    def _changes(self) -> list[str]:
        return [f"changes the mathematics of {self.plan.recipe}: {text}" for text in changed_mathematics(self.plan)]

    def step(self, **facts: Any) -> None:
        """One logged step: the keys of metrics.jsonl."""
        self.steps_done = facts["step"]
        if not self.writes:
            return
        self._write(facts)
        balance = facts["load_balancing_loss"]
        self.say(
            f"{facts['step']:>7} {facts['lm_loss']:>9.4f} {'':>9} {facts['grad_norm']:>9.3f}"
            f" {facts['learning_rate']:>9.2e} {'-' if balance is None else f'{balance:.4f}':>8}"
            f" {facts['tokens_per_second']:>9,.0f} {facts['step_seconds']:>8.3f}"
        )
        self.progress.update(self.task, completed=facts["step"])
        self.status("running", "")

    def validation(self, step: int, **losses: float) -> None:
        """A held-out loss (val_loss or test_loss), after `step` steps."""
        if self.writes:
            self._write({"step": step, **losses})
            ((name, value),) = losses.items()
            self.last_val_loss = losses.get("val_loss", self.last_val_loss)
            self.say(f"{step:>7} {'':>9} {value:>9.4f}" + ("" if name == "val_loss" else f"  ({name})"))

    def finish(self, steps: int, stopped: bool, entropy: float | None) -> None:
        """After the last step: report.png, the closing line, the state that whoever requeues a job reads."""
        if not self.writes:
            return
        self.progress.stop()
        config = self.plan.config
        picture = figure.draw(self.directory, " ".join([config.name, *tags(self.plan)]), entropy)
        state = "stopped" if stopped else "finished"
        self.status(state, "asked to stop by a signal" if stopped else "trainer.max_steps")
        if self.last_val_loss is not None and entropy is not None:
            self.say(f"last val_loss {self.last_val_loss:.4f}; unigram entropy of the validation tokens {entropy:.4f}")
        self.say(
            f"{state} after {steps} of {config.trainer.max_steps} steps; see {self.directory} and {picture.name} in it"
        )

    def status(self, state: str, reason: str) -> None:
        if self.writes:
            steps = self.plan.config.trainer.max_steps
            changed = {"changed_mathematics": changed_mathematics(self.plan)} if self.plan.recipe else {}
            write_status(self.directory, state=state, step=self.steps_done, max_steps=steps, reason=reason, **changed)

    def _write(self, facts: dict[str, Any]) -> None:
        if tags(self.plan):
            facts = {**facts, "tags": tags(self.plan)}
        self.metrics.write(json.dumps(facts, allow_nan=False) + "\n")
        if self.tensorboard:
            for name, value in facts.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.tensorboard.add_scalar(name, value, facts["step"])


def _tensorboard(directory: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"))


def _progress(console: Console) -> Progress:
    """A bar at the bottom of a terminal; elsewhere nothing, the lines speak for themselves."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,  # it goes to the rank's log
        disable=not console.is_terminal,
    )
