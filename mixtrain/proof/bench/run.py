"""Runs a benchmark: from its variants to its readings. No torch.

Rule: every variant must compute the same as the first one. If all processes are resident, this is
checked before the first timed turn; otherwise at the start of each variant's process.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixtrain.config import memory
from mixtrain.config.choices import Precision
from mixtrain.errors import Fault
from mixtrain.proof.bench import command
from mixtrain.proof.bench.background_load import BackgroundLoad, wait_for_quiet
from mixtrain.proof.bench.machine import ROOT
from mixtrain.proof.bench.reading import Reading
from mixtrain.proof.bench.scenario import Measure, Scenario, ScenarioRow
from mixtrain.proof.bench.variant_processes import VariantProcesses, WarmupResult
from mixtrain.proof.bench.variants import Variant

# Relative tolerance of (LM loss, gradient norm). fp32: sums in another order. bf16: every product
# is rounded to 3 digits, in another order, and an expert choice that is nearly a tie may change.
TOLERANCE = {
    Precision.fp32: (1e-5, 1e-3),
    Precision.bf16: (5e-3, 5e-2),
    Precision.fp8: (5e-2, 5e-1),
}

Say = Callable[[str], None]


def readings_of(
    name: str, row: ScenarioRow, variants: list[Variant], scenario: Scenario, folder: Path, say: Say
) -> Iterator[Reading]:
    """Yield the readings of a row, in the order in which they are taken."""
    if row.measure is Measure.command:
        yield from _command_readings(name, row, variants, scenario, folder)
        return
    label = f"{name} FORCED" if any(variant.is_forced for variant in variants) else name
    with contextlib.ExitStack() as stack:

        def start(variant: Variant, turn: int) -> VariantProcesses:
            processes = VariantProcesses(variant, scenario, folder / str(turn) / variant.name)
            # after an error, kill them instead of waiting
            stack.push(lambda kind, *_: processes.kill() if kind else None)
            stack.callback(processes.close)
            return processes

        names = ", ".join(variant.name for variant in variants)
        say(f"{name}: {names} build their models and warm up ...")
        results: dict[str, WarmupResult] = {}
        if scenario.resident:
            resident = {variant.name: start(variant, 0) for variant in variants}  # all at once
            for variant_name, processes in resident.items():
                results[variant_name] = processes.wait_until_ready()
            check_same_results(name, variants, results)
        for number in range(1, scenario.rounds + 1):
            wait_for_quiet(scenario.patience_seconds)
            for variant in variants:
                if scenario.resident:
                    processes = resident[variant.name]
                else:
                    processes = start(variant, number)
                    results[variant.name] = processes.wait_until_ready()
                    ready = [each for each in variants if each.name in results]
                    check_same_results(name, ready, results)
                with BackgroundLoad() as load:
                    measured = processes.take_turn()
                measured["others"] = load.busy_cpus(measured["cpu_seconds"])
                constants = constants_of(variant, results[variant.name])
                yield Reading(label, number, variant.name, **measured, **constants)
                if not scenario.resident:
                    processes.close()


def constants_of(variant: Variant, result: WarmupResult) -> dict[str, Any]:
    """Return the fields that are the same in all readings of a variant."""
    if variant.measure is Measure.save:
        return {"unit": "bytes"}
    config = variant.plan.config
    flops = {
        name: memory.training_flops(config.model, config.data.seq_length, name == "flops_causal")
        for name in ("flops_causal", "flops_whole")
    }
    # the plan's state includes the optimizer's
    has_optimizer = variant.measure is Measure.step
    return {
        "unit": "tokens",
        "ranks": variant.ranks,
        "held_bytes": result.held_bytes,
        "state_bytes": variant.plan.state_bytes if has_optimizer else None,
        **flops,
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
        command.run(f"{name}, prepare", row.prepare, shared, folder / "prepare", None, ROOT)
    for number in range(1 - scenario.warmup, scenario.rounds + 1):
        wait_for_quiet(scenario.patience_seconds)
        for variant in variants:
            turn = folder / f"turn_{number}_{variant.name}"
            with BackgroundLoad() as load:
                result = command.run(variant.name, variant.command, shared, turn, row.until, ROOT)
            if number > 0:
                measured = asdict(result) | {"others": load.busy_cpus(result.cpu_seconds)}
                yield Reading(name, number, variant.name, amount=1, unit="runs", **measured)
    shutil.rmtree(shared)
