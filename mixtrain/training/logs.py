"""A run's output: status.json, report.png, and each record to the sinks (training/sinks/).

Rule: only rank 0 writes; on other ranks Logs does nothing.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

from mixtrain.checkpoint.write_errors import Unwritable, convert_write_errors
from mixtrain.config.plan import Plan
from mixtrain.config.plan_page import changed_mathematics, render, tags
from mixtrain.system.status import write_status
from mixtrain.training import plot
from mixtrain.training.run_directory import previous_status
from mixtrain.training.sinks import sinks_of
from mixtrain.training.sinks.sink import LAST, RunEnd
from mixtrain.training.sinks.terminal import Terminal, change_lines

# share of a layer's tokens on its busiest top-k experts from which the other experts stop learning
COLLAPSE_SHARE = 0.9


class Logs:
    """The records of one run, a context manager. `writes` is true only on the first rank."""

    def __init__(self, plan: Plan, writes: bool, config_yaml: str):
        self.plan = plan
        self.writes = writes
        self.config_yaml = config_yaml
        self.directory = Path(plan.config.run_dir)
        self.steps_done = previous_status(str(self.directory)).get("step", 0)
        if not writes:
            return
        with contextlib.suppress(OSError):  # the first write there reports the error
            self.directory.mkdir(parents=True, exist_ok=True)
        self.terminal = Terminal(plan)
        self.sinks = sinks_of(plan, self.say)

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self.terminal.close()
            for sink in self.sinks:
                # every record is flushed when it is written, and a failure was reported then
                with contextlib.suppress(OSError):
                    sink.close()

    def say(self, line: str) -> None:
        """Print a line on the first rank."""
        if self.writes:
            self.terminal.say(line)

    def begin(self, step: int) -> None:
        """Open the sinks and print the header before the first step after `step`.

        A run that is refused before this call has changed none of the previous run's records.
        """
        self.steps_done = step
        if not self.writes:
            return
        header = "".join(f"# {line}\n" for line in change_lines(self.plan))
        with convert_write_errors(self.directory):
            (self.directory / "config.yaml").write_text(header + self.config_yaml)
            (self.directory / "plan.txt").write_text(render(self.plan) + "\n")
        for sink in self.sinks:
            sink.begin(step)
        self.status("running", "")
        self.terminal.begin(step)

    def step(self, last: bool, **metrics: Any) -> None:
        """Log one step; `metrics` are the keys of metrics.jsonl.

        `last`: it is logged only because the run ends there.
        """
        self.steps_done = metrics["step"]
        if not self.writes:
            return
        topk = self.plan.config.model.moe_router_topk
        collapsed = collapsed_layers(metrics["tokens_per_expert"], topk)
        record = self._record(
            metrics | ({"collapsed_layers": collapsed} if collapsed else {}), last
        )
        for sink in (*self.sinks, self.terminal):
            sink.step(record)
        self.status("running", "")

    def validation(self, step: int, last: bool = False, **losses: float) -> None:
        """Log a held-out loss, val_loss or test_loss, after `step` steps.

        `last`: it was measured only because the run ends there.
        """
        if self.writes:
            record = self._record({"step": step, **losses}, last)
            for sink in (*self.sinks, self.terminal):
                sink.validation(record)

    def _record(self, metrics: dict[str, Any], last: bool) -> dict[str, Any]:
        marks = {"tags": tags(self.plan)} if tags(self.plan) else {}
        return {**metrics, **marks, **({LAST: True} if last else {})}

    def finish(
        self, steps: int, stop_signal: int | None, stopped: bool, entropy: float | None
    ) -> None:
        """Draw report.png, set the final state in status.json, and print the closing line.

        `stop_signal`: the signal to this rank; None if another rank got it or the run was not
        `stopped`. `entropy`: of the validation tokens in nats, if known.
        """
        if not self.writes:
            return
        self.terminal.close()
        title = " ".join([self.plan.config.name, *tags(self.plan)])
        picture = plot.draw(self.directory, title, entropy)
        state = "stopped" if stopped else "finished"
        if not stopped:
            reason = "trainer.max_steps"
        elif stop_signal:
            reason = f"stopped by {signal.Signals(stop_signal).name}"
        else:
            reason = "asked to stop by a signal to another rank"
        self.status(state, reason)
        for sink in (*self.sinks, self.terminal):
            sink.finish(RunEnd(state, steps, reason, picture, entropy))

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


def collapsed_layers(tokens_per_expert: list[list[int]], topk: int) -> list[int]:
    """Return the layers, from 1, whose busiest `topk` experts get more than COLLAPSE_SHARE."""
    return [
        number
        for number, load in enumerate(tokens_per_expert, start=1)
        if len(load) > topk and sum(sorted(load)[-topk:]) > COLLAPSE_SHARE * sum(load)
    ]
