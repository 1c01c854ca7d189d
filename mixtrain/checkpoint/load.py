"""Find the checkpoint to resume from, check that it fits the run, and load its tensors in place.

Rule: a checkpoint that is not exactly this run's state is refused with the key or file, before
anything in the run changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mixtrain.checkpoint import (
    content,
    directory,
    integrity,
    optimizer_state,
    safe,
    safe_load,
    same_model,
)
from mixtrain.checkpoint.state import RunState
from mixtrain.config import tensor_schema
from mixtrain.config.choices import Resume, Verify
from mixtrain.config.plan import Plan
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import plain
from mixtrain.engine.optimizer import Training
from mixtrain.engine.process_groups import Ranks
from mixtrain.engine.shards import unwrap
from mixtrain.errors import UserError
from mixtrain.system import collectives

SHOWN = 8  # differing tensors in a message
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float16: published weights only


def find_checkpoint(
    plan: Plan, ranks: Ranks, say: Callable[[str], None], heartbeat=lambda: None
) -> Path | None:
    """Return the newest valid checkpoint of run_dir, None for a new run. All ranks must call it.

    Each rank verifies a share of the files. Damaged checkpoints are logged and skipped. UserError
    if checkpoint.resume = must finds none, or if auto finds only damaged ones: a run with
    checkpoints never silently starts from step 0.
    """
    run_dir = Path(plan.config.run_dir)
    resume = plan.config.checkpoint.resume
    if resume is Resume.never:
        return None
    # read by the first rank alone: file systems of several nodes may lag
    steps = collectives.from_first(lambda: directory.steps_in(run_dir))
    tracked = collectives.from_first(lambda: directory.tracked_step(run_dir))
    if steps and tracked not in steps:
        say(
            f"{run_dir / directory.TRACKER} names no checkpoint that exists; looking at all"
            f" {len(steps)}"
        )
    damage = []
    for step in steps:
        path = directory.path_of(run_dir, step)
        if not (wrong := problem(plan, ranks, path, heartbeat)):
            return path
        damage.append(wrong)
        say(f"warning: {wrong}; {path.name} is skipped")
    if damage or resume is Resume.must:
        advice = "the run_dir of a run that has saved one"
        if damage:
            advice = "another run_dir to start from step 0"
        raise UserError(*damage, f"run_dir = {run_dir} holds no valid checkpoint; give {advice}")
    return None


def problem(plan: Plan, ranks: Ranks, path: Path, heartbeat=lambda: None) -> str:
    """Return what is wrong with a checkpoint, checked by all ranks together; "" if nothing is."""
    full = plan.config.checkpoint.verify is Verify.full
    problem_here = integrity.problem(path, full, ranks.rank, ranks.world_size, heartbeat)
    return collectives.first_problem(problem_here)


def resume(
    plan: Plan,
    ranks: Ranks,
    training: Training,
    path: Path,
    run_state: RunState,
    say: Callable[[str], None],
) -> None:
    """Load model, optimizer, schedule and random streams of this rank from a checkpoint."""
    kind = plain(plan.config.optimizer.optimizer)
    metadata = safe.read_metadata(path)
    iteration = safe.read_common(path).get("iteration")
    if iteration != run_state.step:
        raise UserError(
            f"{path / safe.COMMON} is of step {iteration}, {path.name} of {run_state.step}"
        )
    refuse_other_tensors(path, expected(plan.config, optimizer_state.STATES[kind]), metadata)
    same_model.refuse_differences(plan.config, path)
    optimizer_state.initialize(training, kind)
    wanted = without_extra_state(content.model(training.chunks))
    wanted["optimizer_state"] = optimizer_state.sharded(training, kind)
    rng = content.rng_object(None)
    has_rng_state = rng.unique_key in metadata.state_dict_metadata
    if has_rng_state:
        wanted["rng_state"] = rng
    loaded = _load(wanted, path, ranks)
    _into_model(training.chunks, loaded)
    optimizer_state.set_steps(training, run_state.optimizer_steps)
    training.scheduler.step(increment=run_state.schedule_steps)
    router = plan.config.router
    if has_rng_state and run_state.layout == layout(plan):
        try:
            content.set_rng_state(loaded["rng_state"])
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    elif router.moe_input_jitter_eps or router.moe_router_force_load_balancing:
        say("the layout has changed: the random streams of the router start anew")


def load_weights(
    plan: Plan, ranks: Ranks, training: Training, path: Path, say: Callable[[str], None]
) -> None:
    """Load only the weights, to start a new run from them. UserError if the model differs.

    If the checkpoint has no router biases, they stay at zero, their initial value: the router
    chooses the same experts as without a bias.
    """
    same_model.refuse_differences(plan.config, path)
    metadata = safe.read_metadata(path)
    absent = {key for key in expected(plan.config, ()) if tensor_schema.condition(key) == "bias"}
    absent -= {*metadata.state_dict_metadata}
    load_model(plan, ranks, training.chunks, path, absent)
    training.optimizer.reload_model_params()
    if absent:
        say("the routers' biases start at zero: these weights have none")


def load_model(
    plan: Plan,
    ranks: Ranks,
    chunks: list[torch.nn.Module],
    path: Path,
    absent: Collection[str] = (),
) -> None:
    """Load the weights of a model, except the tensors `absent` (keys), which stay unchanged."""
    refuse_another_model(plan, path, absent)
    wanted = without_extra_state(content.model(chunks), absent)
    _into_model(chunks, _load(wanted, path, ranks), absent)


def refuse_another_model(plan: Plan, path: Path, absent: Collection[str] = ()) -> None:
    """Raise UserError if a checkpoint lacks tensors of the plan's model, before it is allocated."""
    wanted = {key: shape for key, shape in expected(plan.config, ()).items() if key not in absent}
    refuse_other_tensors(path, wanted, safe.read_metadata(path))


def find_weights(plan: Plan, ranks: Ranks, heartbeat=lambda: None) -> Path:
    """Return the checkpoint that checkpoint.load_weights means. UserError if it is damaged."""
    given = Path(plan.config.checkpoint.load_weights)
    path = collectives.from_first(lambda: directory.newest(given)) or given
    if wrong := problem(plan, ranks, path, heartbeat):
        raise UserError(f"checkpoint.load_weights = {given}: {wrong}")
    return path


def layout(plan: Plan) -> dict[str, int]:
    """Return the parallel sizes, which determine the random stream of each rank."""
    sizes = plan.layout
    return {
        "world_size": plan.world_size,
        "tensor": sizes.tp,
        "pipeline": sizes.pp,
        "context": sizes.cp,
        "expert": sizes.ep,
        "expert_tensor": sizes.etp,
    }


def expected(config: Config, states: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return key -> global shape of every tensor that a run reads, with these optimizer states."""
    shapes = tensor_schema.shapes(config)
    trained = {
        key: shape for key, shape in shapes.items() if tensor_schema.init_kind(key) != "buffer"
    }
    names = ("param", *states) if states else ()
    return shapes | {
        f"optimizer.state.{name}.{key}": shape for name in names for key, shape in trained.items()
    }


def refuse_other_tensors(
    path: Path, wanted: dict[str, tuple[int, ...]], metadata: Metadata
) -> None:
    """Raise UserError with the names and shapes that differ between configuration and checkpoint.

    The model is compared first: if it differs, the optimizer does too, which adds no information.
    """
    stored = {
        key: tensor
        for key, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    for name, is_optimizer in (("model", False), ("optimizer", True)):
        wanted_keys = [key for key in wanted if key.startswith("optimizer.") == is_optimizer]
        stored_keys = [key for key in stored if key.startswith("optimizer.") == is_optimizer]
        if not wanted_keys:
            continue
        differences = _differences(
            {key: wanted[key] for key in wanted_keys}, {key: stored[key] for key in stored_keys}
        )
        if differences:
            more = len(differences) - SHOWN
            raise UserError(
                f"{path} is of another {name}:",
                *differences[:SHOWN],
                *([f"... and {more} more tensors"] if more > 0 else []),
            )


def _differences(
    wanted: dict[str, tuple[int, ...]], stored: dict[str, TensorStorageMetadata]
) -> list[str]:
    common = [key for key in wanted if key in stored]
    return [
        *(
            f"{key} is {_show(stored[key].size)} in it, {_show(wanted[key])} in this configuration"
            for key in common
            if tuple(stored[key].size) != wanted[key]
        ),
        *(
            f"{key} {_show(shape)} is not in it"
            for key, shape in wanted.items()
            if key not in stored
        ),
        *(
            f"{key} {_show(tensor.size)} is not in this configuration"
            for key, tensor in stored.items()
            if key not in wanted
        ),
        *(
            f"{key} is {stored[key].properties.dtype} in it; tensors must be"
            f" {' or '.join(map(str, DTYPES))}"
            for key in common
            if stored[key].properties.dtype not in DTYPES
        ),
    ]


def _show(shape: Any) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def without_extra_state(tree: dict[str, Any], absent: Collection[str] = ()) -> dict[str, Any]:
    """Return state dicts of model chunks without _extra_state and without the keys `absent`.

    Transformer Engine unpickles its _extra_state objects without restriction. They are never
    loaded, so fp8 with delayed scaling starts a new history.
    """
    return {
        name: {
            key: leaf
            for key, leaf in chunk.items()
            if not isinstance(leaf, ShardedObject) and getattr(leaf, "key", None) not in absent
        }
        for name, chunk in tree.items()
    }


def _load(wanted: dict[str, Any], path: Path, ranks: Ranks) -> dict[str, Any]:
    """Fill the ShardedTensors and objects of `wanted`; UserError on all ranks if one rank fails.

    Same steps as Megatron-Core's torch_dist strategy, with readers that execute nothing (safe.py).
    """
    wanted, _, factories = load_preprocess(wanted)
    by_key, names, renamed = strategy._replace_state_dict_keys_with_sharded_keys(wanted)
    tensors = strategy.mcore_to_pyt_state_dict(by_key, True)
    planner = safe_load.MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    error = ""
    try:
        torch.distributed.checkpoint.load(
            tensors, storage_reader=safe_load.Reader(path), planner=planner, no_dist=True
        )
    except CheckpointException as failure:  # not an Exception
        error = next((str(cause[0]) for cause in failure.failures.values()), str(failure))
    except (OSError, RuntimeError, UserError) as failure:
        error = str(failure)
    for rank, text in collectives.failures(error):
        raise UserError(f"{path} on rank {rank}: {text}")
    loaded = {key: strategy._unwrap_pyt_sharded_tensor(value) for key, value in tensors.items()}
    loaded = strategy._replace_sharded_keys_with_state_dict_keys(loaded, names, renamed)
    strategy._restore_dict_types(loaded, wanted)
    return apply_factory_merges(loaded, factories)


def _into_model(
    chunks: list[torch.nn.Module], loaded: dict[str, Any], absent: Collection[str] = ()
) -> None:
    not_loaded = ("_extra_state", *(key.rpartition(".")[2] for key in absent))
    for number, chunk in enumerate(chunks):
        name = "model" if len(chunks) == 1 else f"model{number}"
        result = unwrap(chunk).load_state_dict(loaded[name], strict=False)
        differing = [
            key
            for key in (*result.missing_keys, *result.unexpected_keys)
            if not key.endswith(not_loaded)
        ]
        if differing:
            raise RuntimeError(
                f"the checkpoint's names and the model's differ: {', '.join(differing[:5])}"
            )
