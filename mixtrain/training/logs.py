"""What a run says and leaves behind: the terminal, metrics.jsonl, TensorBoard, status.json, report.png.

Rule: rank 0 writes, the others are given an object that does nothing. One line per logged step, units in the header.
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
from mixtrain.checkpoint.outlook import Unwritable, writing
from mixtrain.config.choices import Balancing
from mixtrain.config.plan import Plan
from mixtrain.config.plan_page import banners, changed_mathematics, render, tags
from mixtrain.system import untrusted_json
from mixtrain.system.console import Console
from mixtrain.system.status import write_status
from mixtrain.system.untrusted_json import Count, InvalidJson
from mixtrain.training import plot
from mixtrain.training.run_directory import former

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
# of all that is sent, to as few experts as a token has: the others have stopped learning
MOST = 0.9
SHARES = ("token_drop_rate", "balanced_choices_changed")
QUIET_STEPS = 10  # logged steps between two warnings of the same kind
LAST = "last"  # marks a record that is there because the run ended, and not at its interval
HEADER = " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())
DROPPED = f" {'dropped':>8}"  # one column more where tokens can be
CHANGED = f" {'changed':>8}"  # and where a balanced router changes choices


class Record(TypedDict):
    """A line of metrics.jsonl, as far as all have the same."""

    step: Count


class Logs:
    """The records of one run. Use as a context manager; `writes` is false on every rank but the first."""

    def __init__(self, plan: Plan, writes: bool, config_yaml: str):
        self.plan = plan
        self.writes = writes
        self.config_yaml = config_yaml
        self.directory = Path(plan.config.run_dir)
        self.steps_done = former(str(self.directory)).get("step", 0)
        self.last_val_loss = None
        self.metrics = self.tensorboard = None
        if not writes:
            return
        with contextlib.suppress(OSError):  # what cannot be written there says so itself
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
            if self.metrics:
                # each line is written at once; what failed has been said
                with contextlib.suppress(OSError):
                    self.metrics.close()
            if self.tensorboard:
                with contextlib.suppress(OSError):
                    self.tensorboard.close()

    def say(self, line: str) -> None:
        if not self.writes:
            return
        # it was one: there is no bar in a log
        if self.progress.live.is_started and not self.console.is_terminal:
            self.progress.stop()
        self.console.print(line, soft_wrap=True, markup=False)
        sys.stdout.flush()

    def begin(self, step: int) -> None:
        """Before the first step after `step`: the files, the header, and the bar where there is a terminal.

        Until here a run that is refused has changed nothing of what the one before it has left.
        """
        self.steps_done = step
        if self.writes:
            head = "".join(f"# {line}\n" for line in self._changes())
            with writing(self.directory):
                (self.directory / "config.yaml").write_text(head + self.config_yaml)
                (self.directory / "plan.txt").write_text(render(self.plan) + "\n")
                damage = cut_back(self.directory / "metrics.jsonl", step)
                self.metrics = open(self.directory / "metrics.jsonl", "a", buffering=1)
                if self.plan.config.logging.tensorboard:
                    self.tensorboard = _tensorboard(self.directory, step)
            self.progress.update(self.task, completed=step)
            self.status("running", "")
            if damage:
                self.say(f"warning: {damage}")
        for line in [*banners(self.plan), *self._changes()]:
            self.say(line)
        balanced = Balancing.balanced in self.plan.config.router.moe_router_load_balancing_type
        drops = self.plan.config.dispatcher.moe_expert_capacity_factor is not None
        self.say(HEADER + DROPPED * drops + CHANGED * balanced)
        if self.writes:
            self.progress.start()

    def _changes(self) -> list[str]:
        return [
            f"changes the mathematics of {self.plan.recipe}: {text}"
            for text in changed_mathematics(self.plan)
        ]

    def step(self, last: bool, **facts: Any) -> None:
        """One logged step: the keys of metrics.jsonl. `last`: it is logged because the run ends there."""
        self.steps_done = facts["step"]
        if not self.writes:
            return
        collapsed = collapsed_layers(
            facts["tokens_per_expert"], self.plan.config.model.moe_router_topk
        )
        self._write(facts | ({"collapsed_layers": collapsed} if collapsed else {}), last)
        balance = _show(facts["load_balancing_loss"], 4)
        self.say(
            f"{facts['step']:>7} {_show(facts['lm_loss'], 4):>9} {'':>9}"
            f" {_show(facts['grad_norm'], 3):>9} {facts['learning_rate']:>9.2e} {balance:>8}"
            f" {facts['tokens_per_second']:>9,.0f} {facts['step_seconds']:>8.3f}"
            + "".join(f" {facts[name]:>8.2%}" for name in SHARES if name in facts)
        )
        self._warn_of_collapse(facts, collapsed)
        self.progress.update(self.task, completed=facts["step"])
        self.status("running", "")

    def _warn_of_collapse(self, facts: dict[str, Any], layers: list[int]) -> None:
        """Say, once in a while, that a layer sends nearly all tokens to the same few experts."""
        topk = self.plan.config.model.moe_router_topk
        self.since_warned += 1
        if not layers or self.since_warned < QUIET_STEPS:
            return
        self.since_warned = 0
        load = facts["tokens_per_expert"][layers[0] - 1]
        busiest = sorted(sorted(range(len(load)), key=load.__getitem__)[-topk:])
        share = sum(load[expert] for expert in busiest) / sum(load)
        more = f" (and {len(layers) - 1} more layers)" if len(layers) > 1 else ""
        self.say(
            f"warning: step {facts['step']}: layer {layers[0]}{more} sends {share:.0%} of its"
            f" tokens to expert{'s' * (topk > 1)} {', '.join(map(str, busiest))}:"
            f" {' '.join(map(str, load))}"
        )

    def validation(self, step: int, last: bool = False, **losses: float) -> None:
        """A held-out loss (val_loss or test_loss), after `step` steps. `last`: measured because the run ends there."""
        if self.writes:
            self._write({"step": step, **losses}, last)
            ((name, value),) = losses.items()
            self.last_val_loss = losses.get("val_loss", self.last_val_loss)
            self.say(
                f"{step:>7} {'':>9} {value:>9.4f}" + ("" if name == "val_loss" else f"  ({name})")
            )

    def finish(self, steps: int, by: int | None, stopped: bool, entropy: float | None) -> None:
        """After the last step: report.png, the closing line, the state that whoever requeues a job reads."""
        if not self.writes:
            return
        self.progress.stop()
        config = self.plan.config
        picture = plot.draw(self.directory, " ".join([config.name, *tags(self.plan)]), entropy)
        state = "stopped" if stopped else "finished"
        asked = (
            f"stopped by {signal.Signals(by).name}"
            if by
            else "asked to stop by a signal to another rank"
        )
        self.status(state, asked if stopped else "trainer.max_steps")
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
        """Replace status.json. Unwritable if it cannot be."""
        if self.writes:
            steps = self.plan.config.trainer.max_steps
            changed = (
                {"changed_mathematics": changed_mathematics(self.plan)} if self.plan.recipe else {}
            )
            with writing(self.directory / "status.json"):
                write_status(
                    self.directory,
                    state=state,
                    step=self.steps_done,
                    max_steps=steps,
                    reason=reason,
                    **changed,
                )

    def failed(self, reason: str) -> str:
        """Leave in status.json that the run has failed; "", or that this could not be written."""
        try:
            self.status("failed", reason)
        except Unwritable as error:
            return str(error)
        return ""

    def _write(self, facts: dict[str, Any], last: bool) -> None:
        if tags(self.plan):
            facts = {**facts, "tags": tags(self.plan)}
        if last:
            facts = {**facts, LAST: True}
        with writing(self.directory / "metrics.jsonl"):
            self.metrics.write(json.dumps(facts, allow_nan=False) + "\n")
        if self.tensorboard:
            with writing(self.directory / "tensorboard"):
                for name, value in facts.items():
                    if isinstance(value, (int, float)) and name != "step":
                        self.tensorboard.add_scalar(name, value, facts["step"])


def _show(number: float | None, digits: int) -> str:
    """A number of the table; `-` where there is none, as in a step that was skipped."""
    return (
        "-"
        if number is None
        else f"{number:.{digits}f}"
        if abs(number) < 10_000
        else f"{number:.2e}"
    )


def collapsed_layers(tokens_per_expert: list[list[int]], topk: int) -> list[int]:
    """The layers, from 1, where the busiest `topk` experts are sent more than MOST of all that is sent."""
    return [
        number
        for number, load in enumerate(tokens_per_expert, start=1)
        if len(load) > topk and sum(sorted(load)[-topk:]) > MOST * sum(load)
    ]


def cut_back(metrics: Path, step: int) -> str:
    """Leave of metrics.jsonl what a run that goes on after `step` has written or would have; what is wrong with it.

    Later records go, also half of one that a killed run has left, and those that were only made because the run ended.
    Where a line is something else the file is kept as it was, under another name.
    """
    # nothing was saved: the records are all that is left of that run
    if step == 0 and metrics.exists():
        os.replace(metrics, metrics.with_suffix(".jsonl.before"))
    kept = []
    wrong = {}
    last = 0
    for last, line in untrusted_json.lines(metrics) if metrics.exists() else ():
        try:
            record = untrusted_json.parse(line, Record)
        except InvalidJson as error:
            wrong[last] = error
        else:
            if record["step"] <= step and LAST not in record:
                kept.append(line.decode() + "\n")
    damaged = [
        number for number in wrong if number != last or "not valid JSON" not in str(wrong[number])
    ]
    if damaged:
        copyfile(metrics, metrics.with_suffix(".jsonl.damaged"))
    write_atomically(metrics, "".join(kept))
    if not damaged:
        return ""
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return (
        f"line {damaged[0]}{more} of {metrics} is no record ({wrong[damaged[0]]}) and was left out;"
        f" {metrics.name}.damaged is the file as it was"
    )


def _tensorboard(directory: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)


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
