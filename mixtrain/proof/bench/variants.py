"""Turns a scenario's overrides into variants with plans, or leaves one out for a reason. No torch.

Rule: a variant is left out only if an optional package or its hardware is missing, and is then
reported. Any other problem with any variant ends the benchmark before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixtrain.config.choices import Accelerator, AttnBackend, TransformerImpl
from mixtrain.config.compose import compose
from mixtrain.config.plan import Plan
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import from_hydra
from mixtrain.errors import UserError
from mixtrain.interop.convert.hf_config import export_problems
from mixtrain.launch.machine_checks import gpu_count, installed
from mixtrain.proof.bench.scenario import BenchRequest, Measure, ScenarioRow

# Prefixes of overrides that are not train.py's: transformers' model, plain files, environment of
# the processes.
FOREIGN_PREFIXES = ("hf", "plain", "host")
NO_MEMORY_SETTINGS = {"memory_settings": "false"}  # the only override of `host.`


class LeftOut(Exception):
    """This machine cannot run an optional implementation."""


@dataclass(frozen=True)
class Variant:
    """One variant of a row: what its processes run."""

    name: str
    measure: Measure
    plan: Plan | None  # None for a command
    foreign: dict[str, dict[str, str]]  # {"hf": {"experts_implementation": "eager"}}
    command: str | None

    @property
    def ranks(self) -> int:
        is_single = self.plan is None or "hf" in self.foreign or "plain" in self.foreign
        return 1 if is_single else self.plan.world_size


def variants_of(request: BenchRequest) -> tuple[dict[str, list[Variant]], list[str]]:
    """Return ({row: its variants}, the variants left out with the reason).

    Raises UserError with the problems of all variants.
    """
    variants: dict[str, list[Variant]] = {}
    left_out: dict[str, None] = {}
    problems: dict[str, list[str]] = {}
    runnable = 0  # variants that are not left out
    for row_name, row in request.scenario.rows.items():
        for name, overrides in row.variants.items():
            try:
                variant = _variant(name, row, request, overrides)
                variants.setdefault(row_name, []).append(variant)
            except LeftOut as reason:
                left_out[f"{name} ({reason})"] = None
                continue
            except UserError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(f"{row_name}, {name}")
            runnable += 1
    if problems:
        raise UserError(
            *[
                problem if len(names) == runnable else f"{'; '.join(names)}: {problem}"
                for problem, names in problems.items()
            ]
        )
    return variants, list(left_out)


def _variant(name: str, row: ScenarioRow, request: BenchRequest, overrides: list[str]) -> Variant:
    if row.measure is Measure.command:
        if request.overrides:
            raise UserError(
                f"{request.overrides[0]}: this row runs commands, which take no words of train.py"
            )
        return Variant(name, row.measure, None, {}, " ".join(overrides))
    training_overrides: list[str] = []
    foreign: dict[str, dict[str, str]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        prefix, _, rest = key.partition(".")
        if prefix in FOREIGN_PREFIXES:
            foreign.setdefault(prefix, {})[rest] = value
        else:
            training_overrides.append(override)
    if foreign.get("host", NO_MEMORY_SETTINGS) != NO_MEMORY_SETTINGS:
        raise UserError(
            "the only key of host. is host.memory_settings=false, without"
            " mixtrain/system/host_memory.py's settings"
        )
    merged = _merged(request.scenario.words, row.words, training_overrides, request.overrides)
    jobs, problems = compose(merged)
    if len(jobs) != 1:
        raise UserError(*problems, "one configuration at a time: no sweep here")
    config = from_hydra(jobs[0].tree, problems)
    if not problems:
        _check_hardware(config, request.name)
    plan = make_plan(config, None, problems)
    if "hf" in foreign and (conversion_problems := export_problems(plan.config)):
        raise UserError(*conversion_problems)
    return Variant(name, row.measure, plan, foreign, None)


def _merged(*lists: list[str]) -> list[str]:
    """Return the overrides of all lists; a later one replaces one with the same key in place."""
    merged: dict[str, str] = {}
    for override in (override for overrides in lists for override in overrides):
        merged[override.split("=")[0].lstrip("+")] = override
    groups = [merged.pop(key) for key in ("recipe", "shrink") if key in merged]
    return [*groups, *merged.values()]


def _check_hardware(config: Config, scenario: str) -> None:
    """Raise LeftOut, or UserError if this machine cannot run the scenario at all."""
    trainer, model = config.trainer, config.model
    is_gpu = trainer.accelerator is Accelerator.gpu
    if model.transformer_impl is TransformerImpl.transformer_engine:
        if not installed("transformer_engine"):
            raise LeftOut("the package transformer-engine is not installed")
        if not is_gpu:
            raise LeftOut("Transformer Engine needs a GPU")
    if model.attention_backend is AttnBackend.fused and not is_gpu:
        raise LeftOut("cuDNN's attention needs a GPU")
    if is_gpu and gpu_count() < (trainer.devices or 1):
        raise UserError(
            f"scenario={scenario} is for {trainer.devices or 1} GPU, and this machine has"
            f" {gpu_count()}; to run it to its end on this CPU, at tiny sizes: python"
            f" tools/bench.py scenario={scenario} +shrink=laptop"
        )
