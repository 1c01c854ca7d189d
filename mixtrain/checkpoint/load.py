"""Loading: which checkpoint a run goes on from, whether it fits, and its tensors in place at this layout.

Rule: what is not the run's own state to the last bit is refused by name, and nothing in the run has changed by then.
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
    state,
)
from mixtrain.checkpoint.state import RunState
from mixtrain.config import tensor_schema
from mixtrain.config.choices import Resume, Verify
from mixtrain.config.plan import Plan
from mixtrain.config.schema import Config, plain
from mixtrain.engine.optimizer import Training
from mixtrain.engine.process_groups import Ranks
from mixtrain.engine.shards import unwrap
from mixtrain.errors import UserError

SHOWN = 8  # tensors that differ
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the last of published weights alone


def find(
    plan: Plan, ranks: Ranks, say: Callable[[str], None], heartbeat=lambda: None
) -> Path | None:
    """The newest valid checkpoint of run_dir, or None for a new run. Every rank must call; each verifies a share.

    A damaged one is said and passed over. UserError where checkpoint.resume = must finds none, and where auto finds
    none but damaged ones: a run that was there does not begin anew in silence.
    """
    run_dir = Path(plan.config.run_dir)
    resume = plan.config.checkpoint.resume
    if resume is Resume.never:
        return None
    steps = _from_first(ranks, lambda: directory.steps_in(run_dir))
    tracked = _from_first(ranks, lambda: directory.tracked(run_dir))
    if steps and tracked not in steps:
        say(
            f"{run_dir / directory.TRACKER} names no checkpoint that is there; looking at all"
            f" {len(steps)}"
        )
    damage = []
    for step in steps:
        path = directory.path_of(run_dir, step)
        if not (wrong := problem(plan, ranks, path, heartbeat)):
            return path
        damage.append(wrong)
        say(f"warning: {wrong}; {path.name} is passed over")
    if damage or resume is Resume.must:
        advice = (
            "give another run_dir to begin anew"
            if damage
            else "give the run_dir of a run that has saved one"
        )
        raise UserError(*damage, f"run_dir = {run_dir} holds no valid checkpoint; {advice}")
    return None


def problem(plan: Plan, ranks: Ranks, path: Path, heartbeat=lambda: None) -> str:
    """What is wrong with a checkpoint, as all ranks together see it; "" if nothing is."""
    full = plan.config.checkpoint.verify is Verify.full
    mine = integrity.problem(path, full, ranks.rank, ranks.world_size, heartbeat)
    found: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(found, mine)
    return next((text for text in found if text), "")


def _from_first(ranks: Ranks, ask: Callable[[], Any]) -> Any:
    """What the first rank sees on the disk, on all ranks: file systems of a cluster may lag behind one another."""
    answer = [ask() if ranks.is_first else None]
    torch.distributed.broadcast_object_list(answer, src=0)
    return answer[0]


def read_state(path: Path) -> RunState:
    """The run's state in a valid checkpoint."""
    try:
        return state.read(path)
    except ValueError as error:
        raise UserError(str(error)) from None


def resume(
    plan: Plan,
    ranks: Ranks,
    training: Training,
    path: Path,
    run_state: RunState,
    say: Callable[[str], None],
) -> None:
    """Bring model, optimizer, schedule and random streams of this rank to where the checkpoint has them."""
    kind = plain(plan.config.optimizer.optimizer)
    metadata = safe.read_metadata(path)
    common = safe.read_common(path)
    if common.get("iteration") != run_state.step:
        raise UserError(
            f"{path / safe.COMMON} is of step {common.get('iteration')}, {path.name} of"
            f" {run_state.step}"
        )
    refuse_other_tensors(path, expected(plan.config, optimizer_state.STATES[kind]), metadata)
    same_model.refuse(plan.config, path)
    optimizer_state.fill(training, kind)
    wanted = tensors_alone(content.model(training.chunks))
    wanted["optimizer_state"] = optimizer_state.sharded(training, kind)
    rng = content.rng_object(None)
    same_streams = rng.unique_key in metadata.state_dict_metadata
    if same_streams:
        wanted["rng_state"] = rng
    loaded = _load(wanted, path, ranks)
    _into_model(training.chunks, loaded)
    optimizer_state.set_steps(training, run_state.optimizer_steps)
    training.scheduler.step(increment=run_state.schedule_steps)
    if same_streams and run_state.layout == layout(plan):
        try:
            content.set_rng_state(loaded["rng_state"])
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    elif (
        plan.config.router.moe_input_jitter_eps
        or plan.config.router.moe_router_force_load_balancing
    ):
        say("the layout has changed: the random streams of the router start anew")


def load_weights(
    plan: Plan, ranks: Ranks, training: Training, path: Path, say: Callable[[str], None]
) -> None:
    """The weights alone: a new run starts from them. UserError if they are for a model that computes otherwise.

    Routers' biases that they have not stay at zero, where a bias starts: the same experts are chosen as without one.
    """
    same_model.refuse(plan.config, path)
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
    """The weights of a model, but for the tensors that are `absent`: they stay as they are."""
    refuse_another_model(plan, path, absent)
    _into_model(chunks, _load(tensors_alone(content.model(chunks), absent), path, ranks), absent)


def refuse_another_model(plan: Plan, path: Path, absent: Collection[str] = ()) -> None:
    """UserError if a checkpoint has not the tensors of the plan's model: known before the model takes memory."""
    wanted = {key: shape for key, shape in expected(plan.config, ()).items() if key not in absent}
    refuse_other_tensors(path, wanted, safe.read_metadata(path))


def weights_at(plan: Plan, ranks: Ranks, heartbeat=lambda: None) -> Path:
    """The valid checkpoint that checkpoint.load_weights names: itself, or the newest in a directory of some."""
    given = Path(plan.config.checkpoint.load_weights)
    path = _from_first(ranks, lambda: directory.newest(given)) or given
    if wrong := problem(plan, ranks, path, heartbeat):
        raise UserError(f"checkpoint.load_weights = {given}: {wrong}")
    return path


def layout(plan: Plan) -> dict[str, int]:
    """How the ranks are arranged: what decides whose random stream is whose."""
    parallel = plan.config.parallel
    return {
        "world_size": plan.world_size,
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "expert_tensor": parallel.expert_tensor_parallel_size,
    }


def expected(config: Config, states: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Key -> whole shape of every tensor that a run of this configuration reads."""
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
    """UserError with the names and shapes that differ between a configuration and a checkpoint.

    The model's first: where they differ the optimizer's do too, and say no more.
    """
    tensors = {
        key: kind
        for key, kind in metadata.state_dict_metadata.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    for what, optimizer in (("model", False), ("optimizer", True)):
        here = {
            key: shape for key, shape in wanted.items() if key.startswith("optimizer.") == optimizer
        }
        there = {
            key: kind for key, kind in tensors.items() if key.startswith("optimizer.") == optimizer
        }
        if here and (found := _differences(here, there)):
            more = [f"... and {len(found) - SHOWN} more tensors"] if len(found) > SHOWN else []
            raise UserError(f"{path} is of another {what}:", *found[:SHOWN], *more)


def _differences(
    here: dict[str, tuple[int, ...]], there: dict[str, TensorStorageMetadata]
) -> list[str]:
    both = [key for key in here if key in there]
    return [
        *(
            f"{key} is {_show(there[key].size)} there, {_show(here[key])} here"
            for key in both
            if tuple(there[key].size) != here[key]
        ),
        *(f"{key} {_show(shape)} is not in it" for key, shape in here.items() if key not in there),
        *(
            f"{key} {_show(kind.size)} is not in this configuration"
            for key, kind in there.items()
            if key not in here
        ),
        *(
            f"{key} is {there[key].properties.dtype} there; tensors are"
            f" {' or '.join(map(str, DTYPES))}"
            for key in both
            if there[key].properties.dtype not in DTYPES
        ),
    ]


def _show(shape: Any) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def tensors_alone(tree: dict[str, Any], absent: Collection[str] = ()) -> dict[str, Any]:
    """The state dicts of model chunks without their _extra_state objects, and without tensors that are `absent`.

    Those are Transformer Engine's, which unpickles them without restriction: they are never loaded, so that fp8 with
    delayed scaling starts a new history.
    """
    return {
        name: {
            key: part
            for key, part in chunk.items()
            if not isinstance(part, ShardedObject) and getattr(part, "key", None) not in absent
        }
        for name, chunk in tree.items()
    }


def _load(wanted: dict[str, Any], path: Path, ranks: Ranks) -> dict[str, Any]:
    """Fill the ShardedTensors and objects of `wanted` from a checkpoint; a UserError on all ranks if one cannot.

    As Megatron-Core's torch_dist strategy does, but with readers that run nothing: see safe.py.
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
    outcomes: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(outcomes, error)
    if wrong := [f"{path} on rank {rank}: {text}" for rank, text in enumerate(outcomes) if text]:
        raise UserError(wrong[0])
    found = {key: strategy._unwrap_pyt_sharded_tensor(value) for key, value in tensors.items()}
    found = strategy._replace_sharded_keys_with_state_dict_keys(found, names, renamed)
    strategy._restore_dict_types(found, wanted)
    return apply_factory_merges(found, factories)


def _into_model(
    chunks: list[torch.nn.Module], loaded: dict[str, Any], absent: Collection[str] = ()
) -> None:
    kept = ("_extra_state", *(key.rpartition(".")[2] for key in absent))
    for number, chunk in enumerate(chunks):
        name = "model" if len(chunks) == 1 else f"model{number}"
        result = unwrap(chunk).load_state_dict(loaded[name], strict=False)
        differing = (*result.missing_keys, *result.unexpected_keys)
        if left := [key for key in differing if not key.endswith(kept)]:
            raise RuntimeError(
                f"the checkpoint's names and the model's differ: {', '.join(left[:5])}"
            )
