"""The terminal: a line per record under a header with the units, warnings, and a progress bar."""

from __future__ import annotations

import sys
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mixtrain.config.choices import Balancing
from mixtrain.config.plan import Plan
from mixtrain.config.plan_page import banners, changed_mathematics
from mixtrain.system.console import Console
from mixtrain.training.sinks.sink import RunEnd, Sink

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
SHARES = ("token_drop_rate", "balanced_choices_changed")  # columns where the step has them
QUIET_STEPS = 10  # logged steps between two warnings of the same kind
HEADER = " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())
DROPPED = f" {'dropped':>8}"  # an extra column where tokens can be dropped
CHANGED = f" {'changed':>8}"  # and where a balanced router changes choices


class Terminal(Sink):
    """Prints the records; its `say` prints every other line of the run."""

    def __init__(self, plan: Plan):
        super().__init__(plan, self.say)
        self.last_val_loss = None
        self.since_warned = QUIET_STEPS
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
        self.progress = _progress(self.console)
        self.task = self.progress.add_task("training", total=plan.config.trainer.max_steps)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        # the output was a terminal and is a log now, which has no progress bar
        if self.progress.live.is_started and not self.console.is_terminal:
            self.progress.stop()
        self.console.print(line, soft_wrap=True, markup=False)
        sys.stdout.flush()

    def begin(self, step: int) -> None:
        """Print what is special about the plan, and the header."""
        self.progress.update(self.task, completed=step)
        for line in [*banners(self.plan), *change_lines(self.plan)]:
            self.say(line)
        can_drop = self.plan.config.dispatcher.moe_expert_capacity_factor is not None
        balanced = Balancing.balanced in self.plan.config.router.moe_router_load_balancing_type
        self.say(HEADER + DROPPED * can_drop + CHANGED * balanced)
        self.progress.start()

    def step(self, record: dict[str, Any]) -> None:
        balance = _show(record["load_balancing_loss"], 4)
        self.say(
            f"{record['step']:>7} {_show(record['lm_loss'], 4):>9} {'':>9}"
            f" {_show(record['grad_norm'], 3):>9} {record['learning_rate']:>9.2e} {balance:>8}"
            f" {record['tokens_per_second']:>9,.0f} {record['step_seconds']:>8.3f}"
            + "".join(f" {record[name]:>8.2%}" for name in SHARES if name in record)
        )
        self._warn_of_collapse(record)
        self.progress.update(self.task, completed=record["step"])

    def _warn_of_collapse(self, record: dict[str, Any]) -> None:
        """Warn if a layer sends nearly all tokens to the same top-k experts; see QUIET_STEPS."""
        layers = record.get("collapsed_layers")
        topk = self.plan.config.model.moe_router_topk
        self.since_warned += 1
        if not layers or self.since_warned < QUIET_STEPS:
            return
        self.since_warned = 0
        load = record["tokens_per_expert"][layers[0] - 1]
        busiest = sorted(sorted(range(len(load)), key=load.__getitem__)[-topk:])
        share = sum(load[expert] for expert in busiest) / sum(load)
        more = f" (and {len(layers) - 1} more layers)" if len(layers) > 1 else ""
        self.say(
            f"warning: step {record['step']}: layer {layers[0]}{more} sends {share:.0%} of its"
            f" tokens to expert{'s' * (topk > 1)} {', '.join(map(str, busiest))}:"
            f" {' '.join(map(str, load))}"
        )

    def validation(self, record: dict[str, Any]) -> None:
        name = "val_loss" if "val_loss" in record else "test_loss"
        self.last_val_loss = record.get("val_loss", self.last_val_loss)
        self.say(
            f"{record['step']:>7} {'':>9} {record[name]:>9.4f}"
            + ("" if name == "val_loss" else f"  ({name})")
        )

    def finish(self, ending: RunEnd) -> None:
        """Print the closing lines."""
        if self.last_val_loss is not None and ending.entropy is not None:
            self.say(
                f"last val_loss {self.last_val_loss:.4f}; unigram entropy of the validation tokens"
                f" {ending.entropy:.4f}"
            )
        self.say(
            f"{ending.state} after {ending.steps} of {self.plan.config.trainer.max_steps} steps;"
            f" see {self.directory} and {ending.picture.name} in it"
        )

    def close(self) -> None:
        """Remove the progress bar; lines can still be printed."""
        self.progress.stop()


def change_lines(plan: Plan) -> list[str]:
    """Return a line for each override that changes the mathematics of the plan's recipe."""
    return [
        f"changes the mathematics of {plan.recipe}: {text}" for text in changed_mathematics(plan)
    ]


def _show(number: float | None, digits: int) -> str:
    """Format a number of the table; `-` for None, as in a skipped step."""
    if number is None:
        return "-"
    return f"{number:.{digits}f}" if abs(number) < 10_000 else f"{number:.2e}"


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
