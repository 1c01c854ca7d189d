"""metrics.jsonl: one record a line, cut back to the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shutil import copyfile
from typing import Any, TypedDict

from mixtrain.checkpoint.directory import write_atomically
from mixtrain.checkpoint.write_errors import convert_write_errors
from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import Count, InvalidJson
from mixtrain.training.sinks.sink import LAST, Sink


class MetricsRecord(TypedDict):
    """The fields that every line of metrics.jsonl has."""

    step: Count


class MetricsJsonl(Sink):
    """Appends each record and flushes it, so that a killed run loses at most part of a line."""

    file = None

    def begin(self, step: int) -> None:
        path = self.directory / "metrics.jsonl"
        with convert_write_errors(self.directory):
            damage = cut_back(path, step)
            self.file = open(path, "a", buffering=1)
        if damage:
            self.say(f"warning: {damage}")

    def step(self, record: dict[str, Any]) -> None:
        with convert_write_errors(self.directory / "metrics.jsonl"):
            self.file.write(json.dumps(record, allow_nan=False) + "\n")

    validation = step

    def close(self) -> None:
        if self.file:
            self.file.close()


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
