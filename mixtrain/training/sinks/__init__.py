"""The record sinks of a run: one file each, and the list of those that a plan has.

sink.py has the interface. A new sink is a new file and a line of SINKS. The terminal is not in the
list: training/logs.py always has it, and it gets each record last.
"""

from __future__ import annotations

from collections.abc import Callable

from mixtrain.config.plan import Plan
from mixtrain.training.sinks.metrics_jsonl import MetricsJsonl
from mixtrain.training.sinks.sink import Sink
from mixtrain.training.sinks.tensorboard import TensorBoard

SINKS: tuple[type[Sink], ...] = (
    MetricsJsonl,
    TensorBoard,
)


def sinks_of(plan: Plan, say: Callable[[str], None]) -> list[Sink]:
    """Return the sinks of a plan, in the order in which they get a record."""
    return [sink(plan, say) for sink in SINKS if sink.wanted(plan)]
