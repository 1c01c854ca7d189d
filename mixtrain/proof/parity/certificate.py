"""Runs a configuration at every layout and records how each differs from one rank."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from mixtrain.config import layout_sensitive, tensor_schema
from mixtrain.config.laptop_layout import LAPTOP_RANKS
from mixtrain.config.plan import Plan, derive, resolve
from mixtrain.config.rules.upstream import triggered_faults
from mixtrain.config.schema import Config
from mixtrain.engine.forked_ranks import RankFailure, run_ranks
from mixtrain.errors import UserError
from mixtrain.proof.parity import table
from mixtrain.proof.parity.layouts import ParityLayout, all_layouts, legal_plan
from mixtrain.system import scratch
from mixtrain.training import measured_step
from mixtrain.training.compare_steps import TOLERANCES, Verdict, judge

# maximum number of experts (or 2 * top-k): more experts need more tokens, and show nothing new
EXPERTS = 8
# per step, where every layout must have the same number; four pipeline stages with virtual stages
# need a multiple of four
MICROBATCHES = 4
TIMEOUT_SECONDS = 300  # for one layout; the slowest take about 10 s on two cores


class Certificate:
    """A configuration's runs at its layouts, compared with its one-rank run.

    `plans` has every layout that is compared, one rank first. `left_out` has the reasons for which
    layouts are not compared, and their number.
    """

    def __init__(self, name: str, config: Config, folder: Path, say: Callable[[str], None] = print):
        self.name = name
        self.folder = folder
        self.say = say
        experts = min(config.model.num_moe_experts, max(EXPERTS, 2 * config.model.moe_router_topk))
        self.config = replace(config, model=replace(config.model, num_moe_experts=experts))
        self.plans, self.left_out = comparable(self.config)
        self.verdicts: dict[ParityLayout, Verdict] = {}
        if not self.plans:
            raise UserError(
                "no layout is legal with these switches; trainer.mode=plan with +shrink=parity"
                " says why"
            )

    def run(self, sample: int | None = None, seed: int = 0) -> bool:
        """Run all layouts, or `sample` random ones; return whether all are within the limits."""
        layouts = list(self.plans)
        if sample is not None and sample < len(layouts):
            layouts = sorted(random.Random(seed).sample(layouts, sample), key=layouts.index)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("parity.json", "parity.md"):  # remove an earlier certificate
                (self.folder / name).unlink(missing_ok=True)
                (self.folder / f"{name}.tmp").write_text("")
        except OSError as error:
            raise UserError(
                f"run_dir = {self.folder}: {error.strerror}; parity.json and parity.md go there"
            ) from None
        self.say(
            f"{self.name}: {len(layouts)} of {len(self.plans)} layouts of up to 8 ranks,"
            f" {_versions()}"
        )
        for reason, count in self.left_out.items():
            self.say(f"left out: {count} layouts, {reason}")
        with scratch.folder("parity-") as folder:
            self._run(layouts, Path(folder))
        return not any(verdict.outside for verdict in self.verdicts.values())

    def _run(self, layouts: list[ParityLayout], folder: Path) -> None:
        tensors_file = folder / "one_rank.pt"
        started = time.monotonic()
        self.one_rank = run_one_rank(next(iter(self.plans.values())), tensors_file, folder)
        losses = " ".join(f"{loss:.4f}" for loss in self.one_rank["lm_loss"])
        self.say(
            f"one rank: seed {self.one_rank['seed']} ({self.one_rank['tried']} tried), smallest"
            f" top-k margin {self.one_rank['margin']:.1e}, lm_loss {losses}"
        )
        if self.one_rank["margin"] == math.inf:
            raise UserError(
                f"model.num_moe_experts = {self.config.model.num_moe_experts} with"
                f" model.moe_router_topk = {self.config.model.moe_router_topk}: the router has no"
                " choice, so there is nothing to certify of it"
            )
        if self.one_rank["margin"] <= measured_step.MARGIN:
            raise UserError(
                f"no seed of {measured_step.SEEDS} has a top-k margin above"
                f" {measured_step.MARGIN:.0e}: a choice of experts is too near a tie to compare;"
                f" use a larger model.init_method_std than {self.config.model.init_method_std}"
            )
        self.say(f"\n{table.HEADER}")
        for number, layout in enumerate(layouts, start=1):
            verdict = compare_layout(
                self.plans[layout], self.one_rank, tensors_file, folder / str(number)
            )
            self.verdicts[layout] = verdict
            self.say(table.line(layout, verdict))
            if verdict.outside:
                self.say(f"  OUTSIDE: {verdict}")
            if number % 10 == 0 or number == len(layouts):
                minutes = (time.monotonic() - started) / 60
                self.say(f"-- {number} of {len(layouts)} in {minutes:.1f} min")
                self.write()

    def write(self) -> None:
        """Write parity.json (every layout) and parity.md (the table), each atomically."""
        one_rank = {
            key: value for key, value in self.one_rank.items() if key != "largest_gradients"
        }
        record = {
            "name": self.name,
            "versions": _versions(),
            "one_rank": one_rank,
            "left_out": self.left_out,
            "layouts": [
                {
                    "ranks": layout.ranks,
                    **{name: value for name, value in vars(layout).items() if "dp" not in name},
                    "dispatcher": layout.dispatcher.name,
                    "differences": verdict.differences,
                    "outside": verdict.outside[:20],
                }
                for layout, verdict in self.verdicts.items()
            ],
        }
        texts = {"parity.json": json.dumps(record, indent=1) + "\n", "parity.md": self.page()}
        for name, text in texts.items():
            temporary = self.folder / f"{name}.tmp"
            temporary.write_text(text)
            temporary.replace(self.folder / name)

    def page(self) -> str:
        """Return the certificate in Markdown."""
        inside = sum(not verdict.outside for verdict in self.verdicts.values())
        seed, margin = self.one_rank["seed"], self.one_rank["margin"]
        info = [
            ("made with", _versions()),
            ("layouts within the limits", f"{inside} of {len(self.verdicts)}"),
            ("one rank", f"seed {seed}, smallest top-k margin {margin:.1e}"),
        ]
        if layout_sensitive.counts_over_a_step(self.config):
            reason = "as global_aux_loss counts over them"
            info.append(("microbatches a step", f"{MICROBATCHES} at every layout, {reason}"))
        for reason, count in self.left_out.items():
            info.append(("left out", f"{count} layouts, {reason}"))
        return table.markdown(f"Layout parity of {self.name}", info, self.verdicts)


def comparable(config: Config) -> tuple[dict[ParityLayout, Plan], dict[str, int]]:
    """Return (plans of the layouts that must equal one rank, {reason: number of other layouts}).

    A layout at which Megatron-Core is known to be wrong is left out, with the upstream file.
    """
    plans = {}
    left_out = Counter()
    for layout in all_layouts():
        at_layout = resolve(_with_fixed_microbatches(layout.applied_to(config), layout.dp))
        if broken := layout_sensitive.exceeded_limits(at_layout):
            limit, _ = broken[0]
            left_out[f"another run by design: {limit.name}, {limit.why}"] += 1
        elif faults := triggered_faults(derive(at_layout)):
            left_out[f"refused: {faults[0].file}, {faults[0].wrong}"] += 1
        elif (plan := legal_plan(at_layout)) is not None:
            plans[layout] = plan
    return plans, dict(left_out)


def _with_fixed_microbatches(config: Config, data_parallel_size: int) -> Config:
    """Give every layout the same number of microbatches if the router counts over a step."""
    if not layout_sensitive.counts_over_a_step(config):
        return config
    trainer = replace(
        config.trainer,
        micro_batch_size=LAPTOP_RANKS // data_parallel_size,
        global_batch_size=LAPTOP_RANKS * MICROBATCHES,
    )
    # the minimum that every layout can split (2*CP*TP): few expert choices, so none is near a tie
    data = replace(config.data, seq_length=LAPTOP_RANKS * 2)
    return replace(config, data=data, trainer=trainer)


def run_one_rank(plan: Plan, tensors_file: Path, folder: Path) -> dict:
    """Return the figures of the one-rank run (measured_step.reference); write its tensors."""

    def work(identity) -> dict:
        return measured_step.reference(plan, identity, tensors_file)

    (figures,) = run_ranks(1, work, folder / "one_rank", TIMEOUT_SECONDS)
    return figures


def compare_layout(
    plan: Plan,
    one_rank: dict,
    tensors_file: Path,
    folder: Path,
    measure: Callable = measured_step.measure,
) -> Verdict:
    """Run a plan's layout and compare it with one rank; a rank failure is outside the limits."""
    seeded = replace(plan, config=replace(plan.config, seed=one_rank["seed"]))

    def work(identity) -> dict:
        return measure(seeded, identity, tensors_file)

    try:
        results = run_ranks(plan.world_size, work, folder, TIMEOUT_SECONDS)
    except RankFailure as failure:
        return Verdict(dict.fromkeys(TOLERANCES, math.inf), [failure.reason])
    return judge(one_rank, results, tensor_schema.shapes(plan.config))


def _versions() -> str:
    return f"megatron-core {version('megatron-core')}, torch {version('torch')}"
