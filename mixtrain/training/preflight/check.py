"""The preflight on all ranks: facts, wires, two steps of the shrunk recipe; what it says and leaves in preflight.json.

Rule: every rank takes part in every stage, and every verdict is the same on all of them.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from mixtrain.config.plan import Plan
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import Fault, UserError
from mixtrain.system.rank_identity import Identity
from mixtrain.training.preflight import FOLDER, network, node_info, parity, run_dir_of, verdict
from mixtrain.training.preflight.node_info import Facts
from mixtrain.training.preflight.shrink import Shrunk, shrunk

# of one exchange: the first rank may wait for the CPU's result
PATIENCE = timedelta(seconds=parity.PATIENCE_S + 60)
RECORD = "preflight.json"


class Preflight:
    """One preflight. Every rank makes one, and calls `run`."""

    def __init__(self, plan: Plan, identity: Identity, ranks: Ranks, say: Callable[[str], None]):
        self.plan = plan
        self.identity = identity
        self.ranks = ranks
        self.say = say
        self.run_dir = run_dir_of(plan)
        # words go over gloo: what NCCL cannot do must still be told
        self.words = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.record: dict[str, Any] = {"world_size": plan.world_size}

    def run(self) -> None:
        """UserError with all that is wrong with the nodes; a Fault where the wires or the numbers are."""
        started = time.monotonic()
        plans = shrunk(self.plan)
        self.say(f"preflight of {self.plan.world_size} ranks")
        reference = None
        try:
            gathered = self._facts()
            if isinstance(plans, Shrunk) and self.ranks.is_first:
                reference = parity.Reference(plans.one, self.run_dir / FOLDER)
            self._wires([fact.node for fact in gathered])
            self._parity(plans, reference, [fact.node for fact in gathered])
        finally:
            if reference:
                reference.end()
        seconds = time.monotonic() - started
        self._write({"seconds": seconds})
        self._row("ready", f"in {seconds:.1f} s")

    def gather(self, mine: Any) -> list:
        """Every rank's object, on every rank."""
        found: list = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(found, mine, group=self.words)
        return found

    def _facts(self) -> list[Facts]:
        token = self.gather(f".preflight_{secrets.token_hex(8)}")[0]
        said = None
        if self.ranks.is_first:
            try:
                node_info.leave_token(self.run_dir, token)
            except OSError as error:
                said = f"run_dir = {self.run_dir} cannot be written: {error.strerror or error}"
        if said := self.gather(said)[0]:
            raise UserError(said)
        found = self.gather(
            node_info.gather(
                self.plan, self.identity, self.run_dir, token, network.device_facts(self.ranks)
            )
        )
        if self.ranks.is_first:
            (self.run_dir / token).unlink(missing_ok=True)
        problems = verdict.problems(self.plan, found)
        self._write({"ranks": [fact._asdict() for fact in found], "problems": problems})
        if problems:
            raise UserError(*problems)
        self._say_facts(found)
        return found

    def _say_facts(self, found: list[Facts]) -> None:
        first = found[0]
        nodes = list(dict.fromkeys(fact.node for fact in found))
        shown = ", ".join(nodes[:6]) + (f" and {len(nodes) - 6} more" if len(nodes) > 6 else "")
        self._row("nodes", f"{len(nodes)}: {shown}")
        self._row(
            "  code", f"commit {first.commit[:10] or 'unknown'}, source {first.source[:10]}, on all"
        )
        names = [f"{name} {first.versions[name]}" for name in ("python", "torch", "megatron-core")]
        self._row("  libraries", f"{', '.join(names)}, on all")
        if first.gpus:
            self._row(
                "  GPUs", f"{first.gpus} of {first.gpu_name}, {first.gpu_memory / 2**30:.0f} GiB"
            )
        disk = min(fact.disk_free for fact in found) / 2**30
        self._row("  run_dir", f"seen and written by all, {disk:,.0f} GiB free")

    def _wires(self, nodes: list[str]) -> None:
        speeds = []
        fault = None
        try:
            speeds = network.measure(self.ranks)
        except Fault as wrong:
            fault = str(wrong)
        self._all_or_none(fault)
        for row in (table := network.rows(self.gather(speeds), nodes)):
            (slow, middle) = row.all_reduce
            (slow_all, middle_all) = row.all_to_all
            uneven = f"; SLOW: {', '.join(row.slowest)}" if row.is_uneven else ""
            self._row(
                f"  {row.kind} of {row.ranks}",
                f"all-reduce {middle:.2f} GB/s (slowest {slow:.2f}), all-to-all {middle_all:.2f}"
                f" ({slow_all:.2f}), {row.groups} group{'s' * (row.groups > 1)}{uneven}",
            )
        self._write({"wires": [row._asdict() for row in table]})

    def _parity(
        self, plans: Shrunk | str, reference: parity.Reference | None, nodes: list[str]
    ) -> None:
        if isinstance(plans, str):
            self._row("parity", f"not asked: {plans}")
            return
        out, wrong = self.gather((reference.out, reference.wait()) if reference else (None, None))[
            0
        ]
        if wrong:
            raise Fault(f"node {nodes[0]}: {wrong}")
        fault = result = None
        try:
            result = parity.differences(self.plan, plans, self.ranks, Path(out))
        except Exception as error:  # the others must not wait for this rank
            fault = (
                f"node {nodes[self.ranks.rank]}, rank {self.ranks.rank}:"
                f" {type(error).__name__}: {error}"
            )
        self._all_or_none(fault)
        found, figures = parity.verdict(plans, Path(out), self.gather(result))
        self._write({"parity": {"differences": found.differences, "outside": found.outside[:20]}})
        if found.outside:
            raise Fault(
                "the shrunk recipe is not what the CPU computes:"
                f" {parity.first_outside(found, nodes)}"
            )
        worst = max(found.differences["lm_loss"], found.differences["grad_norm"])
        self._row(
            "parity",
            f"lm_loss {figures['lm_loss'][0]:.4f} and all gradients are the CPU's, within"
            f" {worst:.0e}",
        )

    def _all_or_none(self, fault: str | None) -> None:
        """A Fault on all ranks if there is one on any."""
        if faults := [text for text in self.gather(fault) if text]:
            raise Fault("; ".join(dict.fromkeys(faults)))

    def _row(self, name: str, value: str) -> None:
        self.say(f"{name:<21}  {value}")

    def _write(self, more: dict[str, Any]) -> None:
        self.record |= more
        if self.ranks.is_first:
            text = json.dumps(self.record, indent=1) + "\n"
            (Path(self.plan.config.run_dir) / RECORD).write_text(text)
