"""A run's output: the terminal, metrics.jsonl, TensorBoard, status.json, report.png.

Rule: only rank 0 writes; on other ranks Logs does nothing. One line per logged step, units in the
header.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from shutil import copyfile
from typing import Any, TypedDict

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mixtrain.checkpoint.directory import write_atomically
from mixtrain.checkpoint.write_errors import Unwritable, convert_write_errors
from mixtrain.config.choices import Balancing
from mixtrain.config.plan import Plan
from mixtrain.config.plan_page import banners, changed_mathematics, render, tags
from mixtrain.system import untrusted_json
from mixtrain.system.console import Console
from mixtrain.system.status import write_status
from mixtrain.system.untrusted_json import Count, InvalidJson
from mixtrain.training import plot
from mixtrain.training.run_directory import previous_status

COLUMNS = {
    "step": 7,
    "lm_loss": 9,
    "val_loss": 9,
    "grad_norm": 9,
    "lr": 9,
    "balance": 8,
    "tokens/s": 9,
    "s/step": 8,
}
# share of a layer's tokens on its busiest top-k experts from which the other experts stop learning
COLLAPSE_SHARE = 0.9
SHARES = ("token_drop_rate", "balanced_choices_changed")  # columns where the step has them
QUIET_STEPS = 10  # logged steps between two warnings of the same kind
LAST = "last"  # marks a record that was written because the run ended, not at its interval
HEADER = " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())
DROPPED = f" {'dropped':>8}"  # an extra column where tokens can be dropped
CHANGED = f" {'changed':>8}"  # and where a balanced router changes choices


class MetricsRecord(TypedDict):
    """The fields that every line of metrics.jsonl has."""

    step: Count


class Logs:
    """The records of one run, a context manager. `writes` is true only on the first rank."""

    def __init__(self, plan: Plan, writes: bool, config_yaml: str):
        self.plan = plan
        self.writes = writes
        self.config_yaml = config_yaml
        self.directory = Path(plan.config.run_dir)
        self.steps_done = previous_status(str(self.directory)).get("step", 0)
        self.last_val_loss = None
        self.metrics_file = self.tensorboard = None
        if not writes:
            return
        with contextlib.suppress(OSError):  # the first write there reports the error
            self.directory.mkdir(parents=True, exist_ok=True)
        self.since_warned = QUIET_STEPS
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
        self.progress = _progress(self.console)
        self.task = self.progress.add_task("training", total=plan.config.trainer.max_steps)

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self.progress.stop()
            if self.metrics_file:
                # every line is flushed when it is written, and a failure was reported then
                with contextlib.suppress(OSError):
                    self.metrics_file.close()
            if self.tensorboard:
                with contextlib.suppress(OSError):
                    self.tensorboard.close()

    def say(self, line: str) -> None:
        """Print a line on the first rank."""
        if not self.writes:
            return
        # the output was a terminal and is a log now, which has no progress bar
        if self.progress.live.is_started and not self.console.is_terminal:
            self.progress.stop()
        self.console.print(line, soft_wrap=True, markup=False)
        sys.stdout.flush()

    def begin(self, step: int) -> None:
        """Open the files and print the header before the first step after `step`.

        A run that is refused before this call has changed none of the previous run's records.
        """
        self.steps_done = step
        if self.writes:
            header = "".join(f"# {line}\n" for line in self._changes())
            with convert_write_errors(self.directory):
                (self.directory / "config.yaml").write_text(header + self.config_yaml)
                (self.directory / "plan.txt").write_text(render(self.plan) + "\n")
                metrics_path = self.directory / "metrics.jsonl"
                damage = cut_back(metrics_path, step)
                self.metrics_file = open(metrics_path, "a", buffering=1)
                if self.plan.config.logging.tensorboard:
                    self.tensorboard = _tensorboard(self.directory, step)
            self.progress.update(self.task, completed=step)
            self.status("running", "")
            if damage:
                self.say(f"warning: {damage}")
        for line in [*banners(self.plan), *self._changes()]:
            self.say(line)
        can_drop = self.plan.config.dispatcher.moe_expert_capacity_factor is not None
        balanced = Balancing.balanced in self.plan.config.router.moe_router_load_balancing_type
        self.say(HEADER + DROPPED * can_drop + CHANGED * balanced)
        if self.writes:
            self.progress.start()

    def _changes(self) -> list[str]:
        return [
            f"changes the mathematics of {self.plan.recipe}: {text}"
            for text in changed_mathematics(self.plan)
        ]

    def step(self, last: bool, **metrics: Any) -> None:
        """Log one step; `metrics` are the keys of metrics.jsonl.

        `last`: it is logged only because the run ends there.
        """
        self.steps_done = metrics["step"]
        if not self.writes:
            return
        topk = self.plan.config.model.moe_router_topk
        collapsed = collapsed_layers(metrics["tokens_per_expert"], topk)
        self._write(metrics | ({"collapsed_layers": collapsed} if collapsed else {}), last)
        balance = _show(metrics["load_balancing_loss"], 4)
        self.say(
            f"{metrics['step']:>7} {_show(metrics['lm_loss'], 4):>9} {'':>9}"
            f" {_show(metrics['grad_norm'], 3):>9} {metrics['learning_rate']:>9.2e} {balance:>8}"
            f" {metrics['tokens_per_second']:>9,.0f} {metrics['step_seconds']:>8.3f}"
            + "".join(f" {metrics[name]:>8.2%}" for name in SHARES if name in metrics)
        )
        self._warn_of_collapse(metrics, collapsed)
        self.progress.update(self.task, completed=metrics["step"])
        self.status("running", "")

    def _warn_of_collapse(self, metrics: dict[str, Any], layers: list[int]) -> None:
        """Warn if a layer sends nearly all tokens to the same top-k experts; see QUIET_STEPS."""
        topk = self.plan.config.model.moe_router_topk
        self.since_warned += 1
        if not layers or self.since_warned < QUIET_STEPS:
            return
        self.since_warned = 0
        load = metrics["tokens_per_expert"][layers[0] - 1]
        busiest = sorted(sorted(range(len(load)), key=load.__getitem__)[-topk:])
        share = sum(load[expert] for expert in busiest) / sum(load)
        more = f" (and {len(layers) - 1} more layers)" if len(layers) > 1 else ""
        self.say(
            f"warning: step {metrics['step']}: layer {layers[0]}{more} sends {share:.0%} of its"
            f" tokens to expert{'s' * (topk > 1)} {', '.join(map(str, busiest))}:"
            f" {' '.join(map(str, load))}"
        )

    def validation(self, step: int, last: bool = False, **losses: float) -> None:
        """Log a held-out loss, val_loss or test_loss, after `step` steps.

        `last`: it was measured only because the run ends there.
        """
        if self.writes:
            self._write({"step": step, **losses}, last)
            ((name, value),) = losses.items()
            self.last_val_loss = losses.get("val_loss", self.last_val_loss)
            self.say(
                f"{step:>7} {'':>9} {value:>9.4f}" + ("" if name == "val_loss" else f"  ({name})")
            )

    def finish(
        self, steps: int, stop_signal: int | None, stopped: bool, entropy: float | None
    ) -> None:
        """Draw report.png, print the closing line, and set the final state in status.json.

        `stop_signal`: the signal to this rank; None if another rank got it or the run was not
        `stopped`. `entropy`: of the validation tokens in nats, if known.
        """
        if not self.writes:
            return
        self.progress.stop()
        config = self.plan.config
        picture = plot.draw(self.directory, " ".join([config.name, *tags(self.plan)]), entropy)
        state = "stopped" if stopped else "finished"
        if not stopped:
            reason = "trainer.max_steps"
        elif stop_signal:
            reason = f"stopped by {signal.Signals(stop_signal).name}"
        else:
            reason = "asked to stop by a signal to another rank"
        self.status(state, reason)
        if self.last_val_loss is not None and entropy is not None:
            self.say(
                f"last val_loss {self.last_val_loss:.4f}; unigram entropy of the validation tokens"
                f" {entropy:.4f}"
            )
        self.say(
            f"{state} after {steps} of {config.trainer.max_steps} steps; see {self.directory} and"
            f" {picture.name} in it"
        )

    def status(self, state: str, reason: str) -> None:
        """Replace status.json; Unwritable if that fails."""
        if self.writes:
            changed = (
                {"changed_mathematics": changed_mathematics(self.plan)} if self.plan.recipe else {}
            )
            with convert_write_errors(self.directory / "status.json"):
                write_status(
                    self.directory,
                    state=state,
                    step=self.steps_done,
                    max_steps=self.plan.config.trainer.max_steps,
                    reason=reason,
                    **changed,
                )

    def record_failure(self, reason: str) -> str:
        """Set the state "failed" in status.json; return "", or why it could not be written."""
        try:
            self.status("failed", reason)
        except Unwritable as error:
            return str(error)
        return ""

    def _write(self, metrics: dict[str, Any], last: bool) -> None:
        if tags(self.plan):
            metrics = {**metrics, "tags": tags(self.plan)}
        if last:
            metrics = {**metrics, LAST: True}
        with convert_write_errors(self.directory / "metrics.jsonl"):
            self.metrics_file.write(json.dumps(metrics, allow_nan=False) + "\n")
        if self.tensorboard:
            with convert_write_errors(self.directory / "tensorboard"):
                for name, value in metrics.items():
                    if isinstance(value, (int, float)) and name != "step":
                        self.tensorboard.add_scalar(name, value, metrics["step"])


def _show(number: float | None, digits: int) -> str:
    """Format a number of the table; `-` for None, as in a skipped step."""
    if number is None:
        return "-"
    return f"{number:.{digits}f}" if abs(number) < 10_000 else f"{number:.2e}"


def collapsed_layers(tokens_per_expert: list[list[int]], topk: int) -> list[int]:
    """Return the layers, from 1, whose busiest `topk` experts get more than COLLAPSE_SHARE."""
    return [
        number
        for number, load in enumerate(tokens_per_expert, start=1)
        if len(load) > topk and sum(sorted(load)[-topk:]) > COLLAPSE_SHARE * sum(load)
    ]


def cut_back(metrics: Path, step: int) -> str:
    """Cut metrics.jsonl back to the records of the first `step` steps; return a warning or "".

    Removes later records, the partial record of a killed run, and records that exist only because a
    run ended. If any other line is not a record, a copy of the original file is kept as
    metrics.jsonl.damaged.
    """
    # no checkpoint was saved: these records are all that is left of the previous run
    if step == 0 and metrics.exists():
        os.replace(metrics, metrics.with_suffix(".jsonl.before"))
    records = []
    errors = {}
    last = 0
    for last, line in untrusted_json.lines(metrics) if metrics.exists() else ():
        try:
            record = untrusted_json.parse(line, MetricsRecord)
        except InvalidJson as error:
            errors[last] = error
        else:
            if record["step"] <= step and LAST not in record:
                records.append(line.decode() + "\n")
    damaged = [
        number
        for number, error in errors.items()
        if number != last or "not valid JSON" not in str(error)
    ]
    if damaged:
        copyfile(metrics, metrics.with_suffix(".jsonl.damaged"))
    write_atomically(metrics, "".join(records))
    if not damaged:
        return ""
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return (
        f"line {damaged[0]}{more} of {metrics} is not a record ({errors[damaged[0]]}) and was"
        f" removed; {metrics.name}.damaged is the original file"
    )


def _tensorboard(directory: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)


def _progress(console: Console) -> Progress:
    """Return a progress bar at the bottom of a terminal; without a terminal it is disabled."""
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
        redirect_stderr=False,  # stderr goes to the rank's log
        disable=not console.is_terminal,
    )
