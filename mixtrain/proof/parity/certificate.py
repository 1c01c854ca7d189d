"""Runs a configuration at every layout and writes down how each differs from one rank."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from mixtrain.proof.parity.layouts import Layout, all_layouts, legal_plan
from mixtrain.system import scratch
from mixtrain.training import measured_step
from mixtrain.training.compare_steps import LIMITS, Verdict, judge

# at most, or twice as many as a token goes to: more of them need more tokens, and show no more
EXPERTS = 8
# a step, where they must be as many at every layout: of virtual stages four take them by four
MICROBATCHES = 4
PATIENCE_S = 300  # for one layout; the slowest take some 10 s on two cores


class Certificate:
    """A configuration's runs at its layouts, held against its one-rank run.

    `plans` has every layout that is compared, one rank first; `left_out` how many another run is
    expected of, and why.
    """

    def __init__(self, name: str, config: Config, folder: Path, say: Callable[[str], None] = print):
        self.name = name
        self.folder = folder
        self.say = say
        experts = min(config.model.num_moe_experts, max(EXPERTS, 2 * config.model.moe_router_topk))
        self.config = replace(config, model=replace(config.model, num_moe_experts=experts))
        self.plans, self.left_out = comparable(self.config)
        self.verdicts: dict[Layout, Verdict] = {}
        if not self.plans:
            raise UserError(
                "no layout is legal with these switches; trainer.mode=plan with +shrink=parity"
                " says why"
            )

    def run(self, sample: int | None = None, seed: int = 0) -> bool:
        """Run the layouts, or `sample` of them drawn at random; whether all are within the limits."""
        layouts = list(self.plans)
        if sample is not None and sample < len(layouts):
            layouts = sorted(random.Random(seed).sample(layouts, sample), key=layouts.index)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("parity.json", "parity.md"):  # an earlier certificate is not this one's
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

    def _run(self, layouts: list[Layout], folder: Path) -> None:
        wholes = folder / "one_rank.pt"
        started = time.monotonic()
        self.one = one_rank(next(iter(self.plans.values())), wholes, folder)
        self.say(
            f"one rank: seed {self.one['seed']} ({self.one['tried']} tried), smallest top-k margin"
            f" {self.one['margin']:.1e}, lm_loss"
            f" {' '.join(f'{loss:.4f}' for loss in self.one['lm_loss'])}"
        )
        if self.one["margin"] == math.inf:
            raise UserError(
                f"model.num_moe_experts = {self.config.model.num_moe_experts} with"
                f" model.moe_router_topk = {self.config.model.moe_router_topk}: the router has no"
                " choice, so there is nothing to certify of it"
            )
        if self.one["margin"] <= measured_step.MARGIN:
            raise UserError(
                f"no seed of {measured_step.SEEDS} has a top-k margin above"
                f" {measured_step.MARGIN:.0e}: a choice of experts is too near a tie to compare;"
                f" use a larger model.init_method_std than {self.config.model.init_method_std}"
            )
        self.say(f"\n{table.HEADER}")
        for number, layout in enumerate(layouts, start=1):
            verdict = at_layout(self.plans[layout], self.one, wholes, folder / str(number))
            self.verdicts[layout] = verdict
            self.say(table.line(layout, verdict))
            if verdict.outside:
                self.say(f"  OUTSIDE: {verdict}")
            if number % 10 == 0 or number == len(layouts):
                minutes = (time.monotonic() - started) / 60
                self.say(f"-- {number} of {len(layouts)} in {minutes:.1f} min")
                self.write()

    def write(self) -> None:
        """parity.json has every layout, parity.md the table; both whole at any time."""
        record = {
            "name": self.name,
            "versions": _versions(),
            "one_rank": {
                key: value for key, value in self.one.items() if key != "largest_gradients"
            },
            "left_out": self.left_out,
            "layouts": [
                {
                    **layout._asdict(),
                    "dispatcher": layout.dispatcher.name,
                    "differences": verdict.differences,
                    "outside": verdict.outside[:20],
                }
                for layout, verdict in self.verdicts.items()
            ],
        }
        for name, text in (
            ("parity.json", json.dumps(record, indent=1) + "\n"),
            ("parity.md", self.page()),
        ):
            temporary = self.folder / f"{name}.tmp"
            temporary.write_text(text)
            temporary.replace(self.folder / name)

    def page(self) -> str:
        """The certificate in Markdown."""
        inside = sum(not verdict.outside for verdict in self.verdicts.values())
        facts = [
            ("made with", _versions()),
            ("layouts within the limits", f"{inside} of {len(self.verdicts)}"),
            (
                "one rank",
                f"seed {self.one['seed']}, smallest top-k margin {self.one['margin']:.1e}",
            ),
            *self._microbatches(),
            *(
                ("left out", f"{count} layouts, {reason}")
                for reason, count in self.left_out.items()
            ),
        ]
        return table.markdown(f"Layout parity of {self.name}", facts, self.verdicts)

    def _microbatches(self) -> list[tuple[str, str]]:
        if not layout_sensitive.counts_over_a_step(self.config):
            return []
        return [
            (
                "microbatches a step",
                f"{MICROBATCHES} at every layout, as global_aux_loss counts over them",
            )
        ]


def comparable(config: Config) -> tuple[dict[Layout, Plan], dict[str, int]]:
    """(the plans of the layouts that must compute what one rank computes, reason -> how many of the others there are).

    A layout at which Megatron-Core is known to be wrong is one of the others, with the upstream file.
    """
    plans = {}
    left_out = Counter()
    for layout in all_layouts():
        at = resolve(_with_its_microbatches(layout.of(config), layout.dp))
        if beyond := layout_sensitive.exceeded_limits(at, layout.dp):
            left_out.update(
                f"another run by design: {limit.name}, {limit.why}" for limit, _ in beyond[:1]
            )
        elif faults := triggered_faults(derive(at)):
            left_out.update(f"refused: {fault.file}, {fault.wrong}" for fault in faults[:1])
        elif (plan := legal_plan(at)) is not None:
            plans[layout] = plan
    return plans, dict(left_out)


def _with_its_microbatches(config: Config, data_parallel_size: int) -> Config:
    """The configuration with as many microbatches a step at every layout, where the router counts over them."""
    if not layout_sensitive.counts_over_a_step(config):
        return config
    trainer = replace(
        config.trainer,
        micro_batch_size=LAPTOP_RANKS // data_parallel_size,
        global_batch_size=LAPTOP_RANKS * MICROBATCHES,
    )
    # 2*CP*TP at most: few choices, so that none is near a tie
    data = replace(config.data, seq_length=LAPTOP_RANKS * 2)
    return replace(config, data=data, trainer=trainer)


def one_rank(plan: Plan, wholes: Path, folder: Path) -> dict:
    """The figures of the one-rank run (measure.reference), its tensors in the file `wholes`."""
    work = partial(_reference, plan, wholes)
    (figures,) = run_ranks(1, work, folder / "one_rank", PATIENCE_S)
    return figures


def _reference(plan: Plan, wholes: Path, identity) -> dict:
    return measured_step.reference(plan, identity, wholes)


def at_layout(
    plan: Plan, one: dict, wholes: Path, folder: Path, work: Callable = measured_step.measure
) -> Verdict:
    """The verdict on a plan's layout; ranks that fail are outside, with what the one at fault said last."""
    seeded = replace(plan, config=replace(plan.config, seed=one["seed"]))
    try:
        results = run_ranks(
            plan.world_size, lambda identity: work(seeded, identity, wholes), folder, PATIENCE_S
        )
    except RankFailure as failure:
        return Verdict(dict.fromkeys(LIMITS, math.inf), [failure.reason])
    return judge(one, results, tensor_schema.shapes(plan.config))


def _versions() -> str:
    return f"megatron-core {version('megatron-core')}, torch {version('torch')}"
