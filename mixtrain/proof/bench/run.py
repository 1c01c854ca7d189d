"""Runs a benchmark: from its variants to its readings. No torch.

Rule: every variant must compute the same as the first one, which is checked after its warmup. The
load of other processes is measured in every turn; no reading is dropped.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from mixtrain.config import memory
from mixtrain.config.choices import Precision
from mixtrain.errors import Fault
from mixtrain.proof.bench.processes import VariantProcesses, WarmupResult, run_command
from mixtrain.proof.bench.readings import Reading
from mixtrain.proof.bench.scenario import Measure, Scenario, ScenarioRow
from mixtrain.proof.bench.variants import Variant

# Relative tolerance of (LM loss, gradient norm). fp32: sums in another order. bf16: every product
# is rounded to 3 digits, in another order, and an expert choice that is nearly a tie may change.
TOLERANCE = {
    Precision.fp32: (1e-5, 1e-3),
    Precision.bf16: (5e-3, 5e-2),
    Precision.fp8: (5e-2, 5e-1),
}
QUIET = 0.2  # CPUs that other processes may keep busy on a quiet machine


def busy_cpus(interval: float | None = None) -> float:
    """Return the CPUs kept busy on average, during `interval` or since the last call."""
    return psutil.cpu_percent(interval) / 100 * psutil.cpu_count()


def wait_for_quiet(patience_seconds: float) -> None:
    """Wait until other processes leave the machine idle, at most `patience_seconds`."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline and busy_cpus(0.5) > QUIET:
        pass


def measured(turn: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Take a turn; add the CPUs that other processes kept busy during it."""
    busy_cpus()
    began = time.monotonic()
    result = turn()
    own = result["cpu_seconds"] / (time.monotonic() - began)
    return result | {"others": max(0.0, busy_cpus() - own)}


def readings_of(
    name: str,
    row: ScenarioRow,
    variants: list[Variant],
    scenario: Scenario,
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[Reading]:
    """Yield the readings of a row, in the order in which they are taken."""
    if row.measure is Measure.command:
        yield from _command_readings(name, row, variants, scenario, folder)
        return
    label = f"{name} FORCED" if any(variant.plan.is_forced for variant in variants) else name
    results: dict[str, WarmupResult] = {}

    def start(stack: contextlib.ExitStack, variant: Variant, number: int) -> VariantProcesses:
        turn_folder = folder / str(number) / variant.name
        processes = stack.enter_context(VariantProcesses(variant, scenario, turn_folder))
        results[variant.name] = processes.wait_until_ready()
        check_same_results(name, [one for one in variants if one.name in results], results)
        return processes

    say(f"{name}: {', '.join(one.name for one in variants)} build their models and warm up ...")
    with contextlib.ExitStack() as row_stack:
        there = {one.name: start(row_stack, one, 0) for one in variants if scenario.resident}
        for number in range(1, scenario.rounds + 1):
            wait_for_quiet(scenario.patience_seconds)
            for variant in variants:
                with contextlib.ExitStack() as turn_stack:
                    processes = there.get(variant.name) or start(turn_stack, variant, number)
                    values = measured(processes.take_turn)
                    values |= constants_of(variant, results[variant.name])
                    yield Reading(label, number, variant.name, **values)


def constants_of(variant: Variant, result: WarmupResult) -> dict[str, Any]:
    """Return the fields that are the same in all readings of a variant."""
    if variant.measure is Measure.save:
        return {"unit": "bytes"}
    model, length = variant.plan.config.model, variant.plan.config.data.seq_length
    # the plan's state includes the optimizer's
    has_optimizer = variant.measure is Measure.step
    return {
        "unit": "tokens",
        "ranks": variant.ranks,
        "held_bytes": result.held_bytes,
        "state_bytes": variant.plan.state_bytes if has_optimizer else None,
        "flops_causal": memory.training_flops(model, length, causal=True),
        "flops_whole": memory.training_flops(model, length, causal=False),
    }


def check_same_results(row: str, variants: list[Variant], results: dict[str, WarmupResult]) -> None:
    """Raise Fault if a variant has not computed the same as the first one."""
    first, *rest = variants
    expected = results[first.name]
    for variant in rest:
        loss_tolerance, norm_tolerance = TOLERANCE[variant.plan.config.trainer.precision]
        result = results[variant.name]
        losses = zip(expected.losses, result.losses, strict=True)
        pairs = [("LM loss", a, b, loss_tolerance) for a, b in losses]
        if expected.norm is not None and result.norm is not None:
            pairs.append(("gradient norm", expected.norm, result.norm, norm_tolerance))
        for quantity, a, b, tolerance in pairs:
            if not abs(a - b) <= tolerance * abs(a):
                raise Fault(
                    f"{row}: {variant.name} does not compute what {first.name} does: {quantity}"
                    f" {b:.6g} against {a:.6g}, on the same weights and batch (limit {tolerance:g}"
                    " of it); there is nothing to compare"
                )


def _command_readings(
    name: str, row: ScenarioRow, variants: list[Variant], scenario: Scenario, folder: Path
) -> Iterator[Reading]:
    shared = folder / "shared"
    shared.mkdir(parents=True)
    if row.prepare:
        run_command(f"{name}, prepare", row.prepare, shared, folder / "prepare", None)
    for number in range(1 - scenario.warmup, scenario.rounds + 1):
        wait_for_quiet(scenario.patience_seconds)
        for variant in variants:
            turn = folder / f"turn_{number}_{variant.name}"
            command = (variant.name, variant.command, shared, turn, row.until)
            values = measured(lambda command=command: run_command(*command))
            if number > 0:
                yield Reading(name, number, variant.name, **values, amount=1, unit="runs")
    shutil.rmtree(shared)
