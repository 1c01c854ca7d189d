"""The preflight on all ranks: nodes, network, two steps of the shrunk recipe; preflight.json.

Rule: every rank takes part in every stage, and every verdict is the same on all ranks.
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
from mixtrain.system import collectives
from mixtrain.system.rank_identity import Identity
from mixtrain.training.preflight import FOLDER, network, node_info, parity, run_dir_of, verdict
from mixtrain.training.preflight.node_info import NodeInfo
from mixtrain.training.preflight.shrink import ShrunkPlans, shrink

# of one exchange, in which the first rank may wait for the CPU's result
PATIENCE = timedelta(seconds=parity.PATIENCE_S + 60)
RECORD = "preflight.json"


class PreflightRun:
    """One preflight. Every rank creates one and calls `run`."""

    def __init__(self, plan: Plan, identity: Identity, ranks: Ranks, say: Callable[[str], None]):
        self.plan = plan
        self.identity = identity
        self.ranks = ranks
        self.say = say
        self.run_dir = run_dir_of(plan)
        # results go over gloo, so that an NCCL failure can still be reported
        self.gloo_group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.record: dict[str, Any] = {"world_size": plan.world_size}

    def run(self) -> None:
        """Run all checks: UserError with the nodes' problems, Fault for network or numerics."""
        started = time.monotonic()
        plans = shrink(self.plan)
        self.say(f"preflight of {self.plan.world_size} ranks")
        reference = None
        try:
            nodes = [info.node for info in self._check_nodes()]
            if isinstance(plans, ShrunkPlans) and self.ranks.is_first:
                reference = parity.Reference(plans.one_rank, self.run_dir / FOLDER)
            self._check_network(nodes)
            self._check_parity(plans, reference, nodes)
        finally:
            if reference:
                reference.end()
        seconds = time.monotonic() - started
        self._write({"seconds": seconds})
        self._row("ready", f"in {seconds:.1f} s")

    def gather(self, value: Any) -> list:
        """Return every rank's `value`, on every rank."""
        return collectives.gather(value, self.gloo_group)

    def _check_nodes(self) -> list[NodeInfo]:
        """Return the node information of every rank; UserError with all problems."""
        token = self.gather(f".preflight_{secrets.token_hex(8)}")[0]
        problem = None
        if self.ranks.is_first:
            try:
                node_info.leave_token(self.run_dir, token)
            except OSError as error:
                problem = f"run_dir = {self.run_dir} cannot be written: {error.strerror or error}"
        if problem := self.gather(problem)[0]:
            raise UserError(problem)
        device = network.device_info(self.ranks)
        infos = self.gather(
            node_info.collect(self.plan, self.identity, self.run_dir, token, device)
        )
        if self.ranks.is_first:
            (self.run_dir / token).unlink(missing_ok=True)
        problems = verdict.problems(self.plan, infos)
        self._write({"ranks": [info._asdict() for info in infos], "problems": problems})
        if problems:
            raise UserError(*problems)
        self._print_nodes(infos)
        return infos

    def _print_nodes(self, infos: list[NodeInfo]) -> None:
        first = infos[0]
        nodes = list(dict.fromkeys(info.node for info in infos))
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
        disk = min(info.disk_free for info in infos) / 2**30
        self._row("  run_dir", f"seen and written by all, {disk:,.0f} GiB free")

    def _check_network(self, nodes: list[str]) -> None:
        speeds = []
        fault = None
        try:
            speeds = network.measure(self.ranks)
        except Fault as error:
            fault = str(error)
        self._raise_if_any(fault)
        table = network.rows(self.gather(speeds), nodes)
        for row in table:
            slow, middle = row.all_reduce
            slow_all, middle_all = row.all_to_all
            uneven = f"; SLOW: {', '.join(row.slowest)}" if row.is_uneven else ""
            self._row(
                f"  {row.kind} of {row.ranks}",
                f"all-reduce {middle:.2f} GB/s (slowest {slow:.2f}), all-to-all {middle_all:.2f}"
                f" ({slow_all:.2f}), {row.groups} group{'s' * (row.groups > 1)}{uneven}",
            )
        self._write({"wires": [row._asdict() for row in table]})

    def _check_parity(
        self, plans: ShrunkPlans | str, reference: parity.Reference | None, nodes: list[str]
    ) -> None:
        if isinstance(plans, str):
            self._row("parity", f"not checked: {plans}")
            return
        outcome = (reference.out, reference.wait()) if reference else (None, None)
        out, problem = self.gather(outcome)[0]
        if problem:
            raise Fault(f"node {nodes[0]}: {problem}")
        fault = result = None
        try:
            result = parity.differences(self.plan, plans, self.ranks, Path(out))
        except Exception as error:  # the other ranks must not wait for this one
            fault = (
                f"node {nodes[self.ranks.rank]}, rank {self.ranks.rank}:"
                f" {type(error).__name__}: {error}"
            )
        self._raise_if_any(fault)
        comparison, figures = parity.verdict(plans, Path(out), self.gather(result))
        differences = comparison.differences
        self._write({"parity": {"differences": differences, "outside": comparison.outside[:20]}})
        if comparison.outside:
            raise Fault(
                "the shrunk recipe differs from the CPU's result:"
                f" {parity.first_outside(comparison, nodes)}"
            )
        worst = max(differences["lm_loss"], differences["grad_norm"])
        self._row(
            "parity",
            f"lm_loss {figures['lm_loss'][0]:.4f} and all gradients match the CPU's, within"
            f" {worst:.0e}",
        )

    def _raise_if_any(self, fault: str | None) -> None:
        """Raise a Fault on all ranks if any rank has one. Every rank must call."""
        if faults := [text for text in self.gather(fault) if text]:
            raise Fault("; ".join(dict.fromkeys(faults)))

    def _row(self, name: str, value: str) -> None:
        self.say(f"{name:<21}  {value}")

    def _write(self, more: dict[str, Any]) -> None:
        self.record |= more
        if self.ranks.is_first:
            text = json.dumps(self.record, indent=1) + "\n"
            (Path(self.plan.config.run_dir) / RECORD).write_text(text)
