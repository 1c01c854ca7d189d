"""From a scenario's words to variants that are ready to run: each with its plan, or with why it is left out. No torch.

Rule: a variant is left out only for want of an optional package or its hardware, and is named where that happens; any
other problem with any variant ends the benchmark before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixtrain.config.choices import Accelerator, AttnBackend, TransformerImpl
from mixtrain.config.compose import compose
from mixtrain.config.plan import Plan
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config
from mixtrain.errors import UserError
from mixtrain.interop.convert.hf_config import export_problems
from mixtrain.launch.machine_checks import gpu_count, installed
from mixtrain.proof.bench.scenario import Measure, Request, Row

# Prefixes of words that are not train.py's: transformers' model, plain files, what processes get
# from this machine.
FOREIGN = ("hf", "plain", "host")
OWN_MEMORY = {"memory_settings": "false"}  # all that can be said of the machine


@dataclass(frozen=True)
class Variant:
    """One column of a comparison: what its processes get."""

    name: str
    measure: Measure
    plan: Plan | None  # null for a command
    foreign: dict[str, dict[str, str]]  # {"hf": {"experts_implementation": "eager"}}
    line: str | None  # a command

    @property
    def ranks(self) -> int:
        return (
            1 if self.plan is None or {"hf", "plain"} & set(self.foreign) else self.plan.world_size
        )

    @property
    def has_memory_settings(self) -> bool:
        """Whether its processes start with those of mixtrain/system/host_memory.py."""
        return "host" not in self.foreign

    @property
    def is_forced(self) -> bool:
        return self.plan is not None and self.plan.is_forced


def variants_of(request: Request) -> tuple[dict[str, list[Variant]], list[str]]:
    """Row -> its variants, and those left out, with the reason. UserError with every problem of all of them."""
    found = {}
    left_out = []
    problems = {}
    wanted = 0
    for name, row in request.scenario.rows.items():
        found[name] = []
        for variant, words in row.variants.items():
            try:
                made = _variant(variant, row, request, words)
            except UserError as error:
                wanted += 1
                for problem in error.problems:
                    problems.setdefault(problem, []).append(f"{name}, {variant}")
                continue
            if isinstance(made, str):
                left_out.append(f"{variant} ({made})")
            else:
                wanted += 1
                found[name].append(made)
    if problems:
        raise UserError(
            *[
                text if len(of) == wanted else f"{'; '.join(of)}: {text}"
                for text, of in problems.items()
            ]
        )
    return {name: row for name, row in found.items() if row}, list(dict.fromkeys(left_out))


def _variant(name: str, row: Row, request: Request, words: list[str]) -> Variant | str:
    """The variant, or why this machine has none."""
    if row.measure is Measure.command:
        if request.words:
            raise UserError(
                f"{request.words[0]}: this row runs commands, which take no words of train.py"
            )
        return Variant(name, row.measure, None, {}, " ".join(words))
    foreign: dict[str, dict[str, str]] = {}
    for prefix, key, value in (_cut(word) for word in words):
        if prefix in FOREIGN:
            foreign.setdefault(prefix, {})[key] = value
    if foreign.get("host", OWN_MEMORY) != OWN_MEMORY:
        raise UserError(
            "host. has one word: host.memory_settings=false, without"
            " mixtrain/system/host_memory.py's settings"
        )
    own = [word for word in words if _cut(word)[0] not in FOREIGN]
    config, problems = _config(_merged(request.scenario.words, row.words, own, request.words))
    if not problems and (missing := _lacks(config, request)):
        return missing
    plan = make_plan(config, None, problems)
    if "hf" in foreign and (wrong := export_problems(plan.config)):
        raise UserError(*wrong)
    return Variant(name, row.measure, plan, foreign, None)


def _cut(word: str) -> tuple[str, str, str]:
    """hf.experts_implementation=eager -> hf, experts_implementation, eager."""
    key, _, value = word.partition("=")
    prefix, _, rest = key.partition(".")
    return prefix, rest, value


def _merged(*lists: list[str]) -> list[str]:
    """The words of all lists; of those with the same key the last, where the first one stood."""
    merged: dict[str, str] = {}
    for word in (word for words in lists for word in words):
        merged[word.split("=")[0].lstrip("+")] = word
    groups = [merged.pop(key) for key in ("recipe", "shrink") if key in merged]
    return [*groups, *merged.values()]


def _config(words: list[str]) -> tuple[Config, list[str]]:
    """The configuration of words of train.py, and what is wrong with the words."""
    jobs, problems = compose(words)
    if len(jobs) != 1:
        raise UserError(*problems, "one configuration at a time: no sweep here")
    return Config.from_hydra(jobs[0].tree, problems), problems


def _lacks(config: Config, request: Request) -> str | None:
    """Why this machine cannot run an optional implementation; UserError where it cannot run the scenario at all."""
    trainer = config.trainer
    model = config.model
    if model.transformer_impl is TransformerImpl.transformer_engine:
        if not installed("transformer_engine"):
            return "the package transformer-engine is not installed"
        if trainer.accelerator is not Accelerator.gpu:
            return "Transformer Engine needs a GPU"
    if model.attention_backend is AttnBackend.fused and trainer.accelerator is not Accelerator.gpu:
        return "cuDNN's attention needs a GPU"
    if trainer.accelerator is Accelerator.gpu and gpu_count() < (trainer.devices or 1):
        raise UserError(
            f"scenario={request.name} is for {trainer.devices or 1} GPU, and this machine has"
            f" {gpu_count()}; to run it to its end on this CPU, at tiny sizes: python"
            f" tools/bench.py scenario={request.name} +shrink=laptop"
        )
    return None
