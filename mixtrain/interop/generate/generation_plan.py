"""Make the plan of a generation: the run's model on the layout of the user's overrides. No torch.

Rule: every value that decides a token comes from the run or from an override that the tool reports.
A value that would make the text depend on the layout or on the other prompts is refused by its key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mixtrain.checkpoint import directory, integrity
from mixtrain.checkpoint.state import RunState
from mixtrain.config.choices import Accelerator
from mixtrain.config.compose import ADDED_GROUPS, CONF, compose
from mixtrain.config.key_effects import CLASS_OF, MATHEMATICS, show, value_of
from mixtrain.config.plan import Plan, resolve, world_size
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import from_hydra, leaves
from mixtrain.errors import UserError
from mixtrain.launch.machine_checks import environment_problems, gpu_count
from mixtrain.system.rank_identity import Identity

# whole sections from the run's configuration
SECTIONS = ("model", "router", "dispatcher")
# single keys from the run's configuration
KEYS = (
    "name",
    "trainer.accelerator",
    "trainer.precision",
    "trainer.deterministic",
    "trainer.timeout_minutes",
)
# config groups, unless an override selects another option
GROUPS = {"parallel": "ep1", "data": "mock", "checkpoint": "none", "logging": "files"}

# Values that generation sets itself. Dispatchers and implementations compute the same; jitter is
# for training only.
FORCED = {
    "model.transformer_impl": "torch",  # its attention can have a cache
    "model.attention_backend": "auto",
    "router.moe_input_jitter_eps": None,
    # the ranks may have different numbers of tokens
    "dispatcher.moe_token_dispatcher_type": "alltoall",
    "dispatcher.moe_pad_expert_input_to_capacity": False,
    "dispatcher.moe_shared_expert_overlap": False,
    "trainer.mode": "train",
    "trainer.micro_batch_size": 1,
    "trainer.rampup_batch_size": None,
    "trainer.device_memory_gib": None,  # the estimate includes gradients and optimizer
}
# a router that is balanced in training uses top-k in generation, so every layout will do
BALANCING = "router.moe_router_load_balancing_type"
BALANCED = ["balanced"]
# (key, supported values, why other values are not supported)
SUPPORTED = [
    ("parallel.context_parallel_size", [1], "generation does not split sequences"),
    (
        "parallel.virtual_pipeline_model_parallel_size",
        [None],
        "a token passes each pipeline stage once",
    ),
    (
        "parallel.data_parallel_sharding_strategy",
        [None],
        "there are no gradients and no optimizer to shard",
    ),
    (
        "dispatcher.moe_expert_capacity_factor",
        [None],
        "which tokens an expert drops, and so the text, would depend on the other prompts",
    ),
    ("router.moe_router_force_load_balancing", [False], "the router chooses experts at random"),
    (
        "trainer.precision",
        ["bf16", "fp32"],
        "it needs Transformer Engine's layers, which have no cache in mixtrain",
    ),
]


def compose_overrides(overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """Return (the configuration of the overrides, its problems); it does not have the run's model.

    UserError if an override adds a model or a recipe, or asks for several jobs.
    """
    if added := [override for override in overrides if key_of(override) in ADDED_GROUPS]:
        raise UserError(
            *[
                f"{override}: the model is the checkpoint's; give keys of the layout only"
                for override in added
            ]
        )
    overridden = set(map(key_of, overrides))
    groups = [f"{group}={option}" for group, option in GROUPS.items() if group not in overridden]
    jobs, problems = compose([*groups, *overrides])
    if len(jobs) != 1:
        raise UserError(*problems, "generation has no --multirun: one job at a time")
    return jobs[0].tree, problems


def plan_of(
    tree: DictConfig,
    overrides: list[str],
    run_state: RunState,
    checkpoint: Path,
    folder: str,
    identity: Identity | None,
    known_problems=(),
) -> Plan:
    """Return the plan for generating from a checkpoint of `run_state`; ranks write to `folder`.

    `tree` and `known_problems` come from compose_overrides. UserError with every problem.
    """
    tree = OmegaConf.merge(
        tree, {"run_dir": folder, "checkpoint": {"load_weights": str(checkpoint)}}
    )
    for key, value in _values_of_run(run_state):
        if not _is_overridden(key, overrides):
            _set(tree, key, value)
    overridden = set(map(key_of, overrides))
    for key, value in FORCED.items():
        if key not in overridden:
            _set(tree, key, value)
    if OmegaConf.select(tree, BALANCING) == BALANCED:
        _set(tree, BALANCING, ["none"])
    config = _with_unused_sizes(from_hydra(tree, list(known_problems)), identity)
    problems = [
        *known_problems,
        *_forced_overrides(config, overrides),
        *_unsupported_values(config),
    ]
    plan = make_plan(config, identity and identity.world_size, problems)
    if problems := list(_machine_problems(plan, identity)):
        raise UserError(*problems)
    return plan


def _values_of_run(run_state: RunState) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of the run's configuration for SECTIONS and KEYS."""
    for key, value in leaves(run_state.config):
        if key.split(".")[0] in SECTIONS or key in KEYS:
            yield key, value


def _set(tree: DictConfig, key: str, value: Any) -> None:
    if key == "model.extra":  # overrides may have added fields
        value = {**value, **(OmegaConf.select(tree, key) or {})}
    OmegaConf.update(tree, key, value, merge=False, force_add=True)


def _with_unused_sizes(config: Config, identity: Identity | None) -> Config:
    """Set the sizes that rules check and generation does not use, so that they fit the layout."""
    parallel = config.parallel
    tensor_parallel = parallel.tensor_model_parallel_size
    positions = config.model.max_position_embeddings
    resolved = resolve(config, identity and identity.world_size)
    seq_length = max(positions // tensor_parallel, 1) * tensor_parallel
    return replace(
        config,
        parallel=replace(parallel, sequence_parallel=tensor_parallel > 1),
        data=replace(config.data, seq_length=seq_length),
        trainer=replace(config.trainer, global_batch_size=world_size(resolved)),
    )


def _forced_overrides(config: Config, overrides: list[str]) -> Iterator[str]:
    """Yield a problem for each override of a value that generation sets itself."""
    tensor_parallel = config.parallel.tensor_model_parallel_size
    forced = {**FORCED, "parallel.sequence_parallel": tensor_parallel > 1}
    for override in overrides:
        key, _, value = override.partition("=")
        if key_of(override) not in forced:
            continue
        expected = show(forced[key_of(override)])
        if value != expected:
            yield f"{key} = {value}: generation sets this itself, to {expected}; leave it out"


def _unsupported_values(config: Config) -> Iterator[str]:
    for key, supported, reason in SUPPORTED:
        if (value := value_of(config, key)) not in supported:
            yield f"{key} = {show(value)}: {reason}; use {key}={show(supported[0])}"


def _machine_problems(plan: Plan, identity: Identity | None) -> Iterator[str]:
    """Yield what this machine lacks."""
    trainer = plan.config.trainer
    if trainer.accelerator is Accelerator.gpu and (gpus := gpu_count()) < trainer.devices:
        yield (
            f"trainer.accelerator = gpu with trainer.devices = {trainer.devices}, but this machine"
            f" has {gpus} GPUs; use trainer.accelerator=cpu, or another layout"
        )
    if identity is not None:
        yield from environment_problems(plan, identity)
    elif trainer.num_nodes > 1:
        yield (
            f"trainer.num_nodes = {trainer.num_nodes}, but nothing has started the ranks of the"
            " other nodes; start tools/generate.py on each of them with torchrun or srun"
        )


def changed_values(run_state: RunState, plan: Plan) -> list[str]:
    """Return the values that affect tokens and that overrides changed, with the run's values."""
    lines = []
    for key, value in _values_of_run(run_state):
        if (
            CLASS_OF.get(key) != MATHEMATICS
            or key in FORCED
            or (key, value) == (BALANCING, BALANCED)
        ):
            continue
        if (planned := value_of(plan.config, key)) != value:
            lines.append(f"{key} = {show(planned)} (the run: {show(value)})")
    return lines


def _is_overridden(key: str, overrides: list[str]) -> bool:
    """Whether an override sets the key or selects an option of its group."""
    overridden = set(map(key_of, overrides))
    section = key.split(".")[0]
    return key in overridden or (section in overridden and (CONF / section).is_dir())


def key_of(override: str) -> str:
    """Return the key or group of an override."""
    return override.split("=")[0].lstrip("+")


def summary(plan: Plan, run_state: RunState, checkpoint: Path, damaged: list[str]) -> Iterator[str]:
    """Yield lines about the checkpoint, the layout, and what differs from the run."""
    for problem in damaged:
        yield f"warning: {problem}; skipped"
    trainer = plan.config.trainer
    sizes = plan.layout.sizes
    axes = ("TP", "PP", "ETP", "EP", "DP")
    layout = " x ".join(f"{axis} {sizes[axis]}" for axis in axes if sizes[axis] > 1)
    ranks = f"{plan.world_size} ranks ({layout})" if layout else "1 rank"
    yield f"{checkpoint} on {ranks}, {trainer.accelerator.name}, {trainer.precision.name}"
    for line in changed_values(run_state, plan):
        yield f"different from the run: {line}"


def find_checkpoint(given: str, full: bool) -> tuple[Path, list[str]]:
    """Return (a checkpoint, problems of newer ones that are damaged).

    `given` is a checkpoint, or a directory whose newest valid one is taken. `full`: check SHA-256
    instead of sizes. UserError if there is no valid checkpoint.
    """
    path = Path(given)
    candidates = directory.checkpoints_at(path)
    damaged = []
    for checkpoint in candidates:
        if not (problem := integrity.problem(checkpoint, full)):
            return checkpoint, damaged
        damaged.append(problem)
    if not damaged:
        raise UserError(directory.no_checkpoint_at(given))
    if candidates == [path]:
        raise UserError(*damaged)
    raise UserError(*damaged, f"{given} has no valid checkpoint")
