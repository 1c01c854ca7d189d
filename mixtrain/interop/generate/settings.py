"""The plan of a generation: the model as its run had it, on the layout that the user's words ask for. No torch.

Rule: what decides a token comes from the run or from a word that says otherwise; what would make the text depend on
the layout or on the other prompts is refused by its key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mixtrain.checkpoint import directory, integrity, state
from mixtrain.checkpoint.state import RunState
from mixtrain.config.choices import Accelerator
from mixtrain.config.compose import ADDED_GROUPS, CONF, compose
from mixtrain.config.key_effects import CLASS_OF, MATHEMATICS, show, value_of
from mixtrain.config.plan import Plan, resolve, world_size
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config, leaves
from mixtrain.errors import UserError
from mixtrain.launch.machine_checks import gpu_count, started_ranks
from mixtrain.system.rank_identity import Identity

SECTIONS = ("model", "router", "dispatcher")  # of the run, whole
KEYS = (
    "name",
    "trainer.accelerator",
    "trainer.precision",
    "trainer.deterministic",
    "trainer.timeout_minutes",
)
# where the words name no other
GROUPS = {"parallel": "ep1", "data": "mock", "checkpoint": "none", "logging": "files"}

# fmt: off What generation sets itself. Dispatchers and implementations compute the same; the jitter
# is a noise of training.
FORCED = {
    "model.transformer_impl": "torch",  # whose attention can be given a cache
    "model.attention_backend": "auto",
    "router.moe_input_jitter_eps": None,
    # takes another number of tokens from each rank
    "dispatcher.moe_token_dispatcher_type": "alltoall",
    "dispatcher.moe_pad_expert_input_to_capacity": False,
    "dispatcher.moe_shared_expert_overlap": False,
    "trainer.mode": "train",
    "trainer.micro_batch_size": 1,
    "trainer.rampup_batch_size": None,
    "trainer.device_memory_gib": None,  # would count gradients and optimizer
}
# A router that is balanced while training is top-k here, and so takes every layout.
BALANCING = "router.moe_router_load_balancing_type"
BALANCED = ["balanced"]
# Key, the values that there is generation for, and why not for others.
REFUSED = [
    ("parallel.context_parallel_size", [1], "no sequence is split in generation"),
    (
        "parallel.virtual_pipeline_model_parallel_size",
        [None],
        "a token goes through the stages once",
    ),
    (
        "parallel.data_parallel_sharding_strategy",
        [None],
        "there are no gradients and no optimizer to shard",
    ),
    (
        "dispatcher.moe_expert_capacity_factor",
        [None],
        "which tokens an expert drops depends on the prompts beside them, and so would the text",
    ),
    ("router.moe_router_force_load_balancing", [False], "the router chooses experts at random"),
    (
        "trainer.precision",
        ["bf16", "fp32"],
        "it needs Transformer Engine's layers, which have no cache here",
    ),
]
# fmt: on


def composed(words: list[str]) -> tuple[DictConfig, list[str]]:
    """(what the words of the command line compose to, what is wrong with them); the model in it is not the run's."""
    if added := [word for word in words if key_of(word) in ADDED_GROUPS]:
        raise UserError(
            *[
                f"{word}: the model is the checkpoint's; give keys of the layout alone"
                for word in added
            ]
        )
    named = {key_of(word) for word in words}
    groups = [f"{group}={option}" for group, option in GROUPS.items() if group not in named]
    jobs, problems = compose([*groups, *words])
    if len(jobs) != 1:
        raise UserError(*problems, "one generation at a time: no --multirun here")
    return jobs[0].tree, problems


def plan_of(
    tree: DictConfig,
    words: list[str],
    run: RunState,
    checkpoint: Path,
    folder: str,
    identity: Identity | None,
    known=(),
) -> Plan:
    """The plan of ranks that generate from a checkpoint of `run`; `folder` takes what they leave behind.

    UserError with every problem, after those that are `known`.
    """
    tree = OmegaConf.merge(
        tree, {"run_dir": folder, "checkpoint": {"load_weights": str(checkpoint)}}
    )
    for key, value in leaves(run.config):
        if (key.split(".")[0] in SECTIONS or key in KEYS) and not is_named(key, words):
            _set(tree, key, value)
    for key, value in FORCED.items():
        if key not in map(key_of, words):
            _set(tree, key, value)
    if OmegaConf.select(tree, BALANCING) == BALANCED:
        _set(tree, BALANCING, ["none"])
    config = sized(Config.from_hydra(tree, list(known)), identity)
    plan = make_plan(
        config,
        identity and identity.world_size,
        [*known, *_set_by_itself(config, words), *refused(config)],
    )
    if lacking := [*machine(plan, identity)]:
        raise UserError(*lacking)
    return plan


def _set(tree: DictConfig, key: str, value: Any) -> None:
    # words may have added to it
    kept = dict(OmegaConf.select(tree, key) or {}) if key == "model.extra" else {}
    OmegaConf.update(
        tree, key, {**value, **kept} if key == "model.extra" else value, merge=False, force_add=True
    )


def sized(config: Config, identity: Identity | None) -> Config:
    """The sizes that rules ask for and generation has no use for: they fit the layout and mean nothing."""
    parallel = config.parallel
    positions = config.model.max_position_embeddings
    tensor = parallel.tensor_model_parallel_size
    resolved = resolve(config, identity and identity.world_size)
    return replace(
        config,
        parallel=replace(parallel, sequence_parallel=tensor > 1),
        data=replace(config.data, seq_length=max(positions // tensor, 1) * tensor),
        trainer=replace(config.trainer, global_batch_size=world_size(resolved)),
    )


def _set_by_itself(config: Config, words: list[str]) -> Iterator[str]:
    wanted = {
        **FORCED,
        "parallel.sequence_parallel": config.parallel.tensor_model_parallel_size > 1,
    }
    for word in words:
        key, _, value = word.partition("=")
        if key_of(word) in wanted and value != show(wanted[key_of(word)]):
            yield (
                f"{key} = {value}: generation sets this itself, to"
                f" {show(wanted[key_of(word)])}; leave it out"
            )


def refused(config: Config) -> Iterator[str]:
    """What there is no generation for."""
    for key, values, why in REFUSED:
        if (value := value_of(config, key)) not in values:
            yield f"{key} = {show(value)}: {why}; use {key}={show(values[0])}"


def machine(plan: Plan, identity: Identity | None) -> Iterator[str]:
    """What this machine lacks."""
    trainer = plan.config.trainer
    if trainer.accelerator is Accelerator.gpu and (found := gpu_count()) < trainer.devices:
        yield (
            f"trainer.accelerator = gpu with trainer.devices = {trainer.devices}, but this machine"
            f" has {found} GPUs; use trainer.accelerator=cpu, or another layout"
        )
    if identity is not None:
        yield from started_ranks(plan, identity)
    elif trainer.num_nodes > 1:
        yield (
            f"trainer.num_nodes = {trainer.num_nodes}, but nothing has started the ranks of the"
            " other nodes; start tools/generate.py on each of them with torchrun or srun"
        )


def changed(run: RunState, plan: Plan) -> list[str]:
    """What decides a token and is not as the run had it, because a word says so."""
    return [
        f"{key} = {show(here)} (the run: {show(value)})"
        for key, value in leaves(run.config)
        if (key.split(".")[0] in SECTIONS or key in KEYS)
        and CLASS_OF.get(key) == MATHEMATICS
        and key not in FORCED
        and (key, value) != (BALANCING, BALANCED)
        and (here := value_of(plan.config, key)) != value
    ]


def is_named(key: str, words: list[str]) -> bool:
    """A word sets the key itself, or an option of its group."""
    named = {key_of(word) for word in words}
    return key in named or (key.split(".")[0] in named and (CONF / key.split(".")[0]).is_dir())


def key_of(word: str) -> str:
    """The key or group that a word is about."""
    return word.split("=")[0].lstrip("+")


def heading(plan: Plan, run: RunState, checkpoint: Path, damaged: list[str]) -> Iterator[str]:
    """What is generated from, and how: lines for whoever waits."""
    for problem in damaged:
        yield f"warning: {problem}; passed over"
    parallel = plan.config.parallel
    trainer = plan.config.trainer
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "DP": plan.data_parallel_size,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    ranks = f"{plan.world_size} ranks ({layout})" if layout else "1 rank"
    yield f"{checkpoint} on {ranks}, {trainer.accelerator.name}, {trainer.precision.name}"
    for change in changed(run, plan):
        yield f"not as the run had it: {change}"


def find(given: str, full: bool) -> tuple[Path, list[str]]:
    """(the checkpoint of a path: itself, or a directory's newest valid one; what was passed over)."""
    path = Path(given)
    if os.path.exists(path / integrity.MANIFEST):
        if wrong := integrity.problem(path, full):
            raise UserError(wrong)
        return path, []
    damaged = []
    saved = [directory.path_of(path, step) for step in directory.steps_in(path)]
    for newest in [
        *saved,
        *([path / directory.RELEASE] if (path / directory.RELEASE).is_dir() else []),
    ]:
        if not (wrong := integrity.problem(newest, full)):
            return newest, damaged
        damaged.append(wrong)
    if damaged:
        raise UserError(*damaged, f"{given} holds no valid checkpoint")
    what = (
        "no checkpoint (iter_NNNNNNN, release) and no directory that holds one"
        if path.is_dir()
        else "no directory"
    )
    raise UserError(f"{given} is {what}")


def read_state(checkpoint: Path) -> RunState:
    """The run that has written a checkpoint."""
    try:
        return state.read(checkpoint)
    except ValueError as error:
        raise UserError(str(error)) from None
