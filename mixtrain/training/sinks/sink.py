"""The interface of a record sink. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtrain.config.plan import Plan

LAST = "last"  # marks a record that was written because the run ended, not at its interval


@dataclass(frozen=True)
class RunEnd:
    """How a run ended. `entropy`: of the validation tokens in nats, if known."""

    state: str
    steps: int
    reason: str
    picture: Path
    entropy: float | None


class Sink:
    """Where a run's records go: one object on the first rank, called between the steps.

    `begin`, then `step` and `validation` in the order of the records, `finish` if the run was not
    aborted, and `close` in any case. A record is the dictionary that is a line of metrics.jsonl.
    An OSError is raised as Unwritable and ends the run; whoever calls close ignores it.

    These methods must be local and fast. A sink on the network (Weights & Biases, MLflow) will be
    one thread that follows metrics.jsonl from a position that it stores: it never delays a step,
    and after an outage or a restart it continues there.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]):
        self.plan = plan
        self.say = say
        self.directory = Path(plan.config.run_dir)

    @staticmethod
    def wanted(plan: Plan) -> bool:
        """Return whether the plan has this sink."""
        return True

    def begin(self, step: int) -> None:
        """Open the sink before the first step after `step`."""

    def step(self, record: dict[str, Any]) -> None:
        """Write the record of a logged step."""

    def validation(self, record: dict[str, Any]) -> None:
        """Write a held-out loss: `step` and val_loss or test_loss."""

    def finish(self, ending: RunEnd) -> None:
        """Write how the run ended."""

    def close(self) -> None:
        """Release what the sink holds, also if begin was never called or failed."""
