"""A benchmark from its variants to its readings. No torch.

Rule: no ratio is given of variants that have not been seen to compute the same, before the first of
them is timed where their processes live side by side.
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
from mixtrain.proof.bench.background_load import Others, wait_for_quiet
from mixtrain.proof.bench.interleaved import Computed, Processes
from mixtrain.proof.bench.machine import ROOT
from mixtrain.proof.bench.reading import Reading
from mixtrain.proof.bench.scenario import Measure, Row, Scenario
from mixtrain.proof.bench.variants import Variant

# How far LM losses and norms of gradients may differ, relatively. fp32: sums in another order.
# bf16: every product is rounded to 3 digits, in another order, and the choice of experts nearest to
# a tie may fall the other way.
TOLERANCE = {
    Precision.fp32: (1e-5, 1e-3),
    Precision.bf16: (5e-3, 5e-2),
    Precision.fp8: (5e-2, 5e-1),
}

Say = Callable[[str], None]


def readings_of(
    name: str, row: Row, variants: list[Variant], scenario: Scenario, folder: Path, say: Say
) -> Iterator[Reading]:
    """The readings of a row, in the order in which they are taken."""
    if row.measure is Measure.command:
        yield from _commands(name, row, variants, scenario, folder)
        return
    label = f"{name} FORCED" if any(variant.is_forced for variant in variants) else name
    with contextlib.ExitStack() as stack:

        def started(variant: Variant, turn: int) -> Processes:
            found = Processes(variant, scenario, folder / str(turn) / variant.name)
            # after an error nobody is waited for
            stack.push(lambda kind, *_: found.end() if kind else None)
            stack.callback(found.close)
            return found

        say(
            f"{name}: {', '.join(variant.name for variant in variants)} build their models and"
            " warm up ..."
        )
        if scenario.resident:
            resident = {variant.name: started(variant, 0) for variant in variants}  # all at once
            same(name, variants, {own: processes.ready() for own, processes in resident.items()})
        first: dict[str, Computed] = {}
        for number in range(1, scenario.rounds + 1):
            wait_for_quiet(scenario.patience_seconds)
            for variant in variants:
                mine = resident[variant.name] if scenario.resident else started(variant, number)
                if not scenario.resident:
                    first[variant.name] = mine.ready()
                    same(name, [one for one in variants if one.name in first], first)
                with Others() as others:
                    taken = mine.turn()
                busy = others.busy(taken["cpu_seconds"])
                yield Reading(
                    label,
                    number,
                    variant.name,
                    others=busy,
                    **taken,
                    **facts_of(variant, mine.computed),
                )
                if not scenario.resident:
                    mine.close()


def facts_of(variant: Variant, computed: Computed) -> dict[str, Any]:
    """What a reading says of its variant."""
    if variant.measure is Measure.save:
        return {"unit": "bytes"}
    config = variant.plan.config
    flops = {
        name: memory.training_flops(config.model, config.data.seq_length, name == "flops_causal")
        for name in ("flops_causal", "flops_whole")
    }
    # without an optimizer there is less than the plan says
    whole_state = variant.measure is Measure.step
    return {
        "unit": "tokens",
        "ranks": variant.ranks,
        "held_bytes": computed.held_bytes,
        "state_bytes": variant.plan.state_bytes if whole_state else None,
        **flops,
    }


def same(row: str, variants: list[Variant], computed: dict[str, Computed]) -> None:
    """A Fault if a variant has not computed what the first one has: then there is nothing to compare."""
    first, *others = variants
    for other in others:
        of_loss, of_norm = TOLERANCE[other.plan.config.trainer.precision]
        one = computed[first.name]
        two = computed[other.name]
        pairs = [("LM loss", a, b, of_loss) for a, b in zip(one.losses, two.losses, strict=True)]
        if one.norm is not None and two.norm is not None:
            pairs.append(("gradient norm", one.norm, two.norm, of_norm))
        for what, a, b, tolerance in pairs:
            if not abs(a - b) <= tolerance * abs(a):
                raise Fault(
                    f"{row}: {other.name} does not compute what {first.name} does: {what} {b:.6g}"
                    f" against {a:.6g}, on the same weights and batch (limit {tolerance:g} of it);"
                    " there is nothing to compare"
                )


def _commands(
    name: str, row: Row, variants: list[Variant], scenario: Scenario, folder: Path
) -> Iterator[Reading]:
    shared = folder / "shared"
    shared.mkdir(parents=True)
    if row.prepare:
        command.run(f"{name}, prepare", row.prepare, shared, folder / "prepare", None, ROOT)
    for number in range(1 - scenario.warmup, scenario.rounds + 1):
        wait_for_quiet(scenario.patience_seconds)
        for variant in variants:
            turn = folder / f"turn_{number}_{variant.name}"
            with Others() as others:
                taken = command.run(variant.name, variant.line, shared, turn, row.until, ROOT)
            if number > 0:
                busy = others.busy(taken.cpu_seconds)
                yield Reading(
                    name, number, variant.name, amount=1, unit="runs", others=busy, **asdict(taken)
                )
    shutil.rmtree(shared)
