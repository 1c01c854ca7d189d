"""Where a run starts: at a checkpoint of its own, from the weights of another, or at its beginning; and whether it may.

Rule: what is not as it was is said or refused, before anything of the former run is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixtrain.checkpoint import directory, load
from mixtrain.checkpoint.state import RunState
from mixtrain.classes import MATHEMATICS, changes, show
from mixtrain.config import Config, to_yaml
from mixtrain.data.fingerprint import difference
from mixtrain.errors import UserError
from mixtrain.optimizer import Training
from mixtrain.plan import Plan
from mixtrain.ranks import Ranks
from mixtrain.run_directory import attempts_problem, record_attempt

LIBRARIES = ("megatron-core", "torch")
SAID = ("checkpoint.load_weights", "trainer.max_steps", "optimizer.lr_decay_steps")  # changes that need no word


@dataclass(frozen=True)
class Start:
    """The checkpoint a run goes on from, and where that is; (None, RunState()) at the beginning."""

    path: Path | None
    state: RunState


def find(plan: Plan, ranks: Ranks, say: Callable[[str], None]) -> Start:
    """Look for the checkpoint to go on from. Every rank must call."""
    if ranks.is_first:
        directory.remove_leftovers(plan.config.run_dir)
    path = load.find(plan, ranks, say)
    state = RunState() if path is None else load.read_state(path)
    if state.step > plan.config.trainer.max_steps:
        raise UserError(
            f"trainer.max_steps = {plan.config.trainer.max_steps}, but {path} has {state.step} steps already;"
            f" use more than {state.step}, or another run_dir"
        )
    return Start(path, state)


def refuse_a_crash_loop(plan: Plan, ranks: Ranks, start: Start) -> None:
    """UserError if run after run has started here and died; note that this one starts. Every rank must call."""
    run_dir, most, problem = plan.config.run_dir, plan.config.checkpoint.max_attempts, None
    if ranks.is_first and plan.saves:
        problem = attempts_problem(run_dir, start.state.step, most)
        try:
            if not problem:
                record_attempt(run_dir, start.state.step)
        except OSError as error:
            problem = f"run_dir = {run_dir}: {error.filename} cannot be written ({error.strerror})"
    if problem := _of_first(ranks, problem):
        raise UserError(problem)


def enter(
    plan: Plan, ranks: Ranks, training: Training, start: Start, data: dict[str, str], say: Callable[[str], None]
) -> RunState:
    """Bring the run to its start; where it is then, with all that its own checkpoints will say of it.

    `data` is the fingerprint of the training data, on the first rank.
    """
    data = _of_first(ranks, data)
    if start.path:
        if changed := difference(start.state.data, data):
            raise UserError(
                f"{start.path} was trained on other data: {changed}; checkpoint.load_weights={start.path} in a new"
                " run_dir starts a new run from its weights"
            )
        load.resume(plan, ranks, training, start.path, start.state, say)
        say(f"resumed from {start.path}, after {start.state.step} steps and {start.state.consumed_samples:,} sequences")
        for line in changed_since(plan.config, start.state):
            say(f"changed since then: {line}")
    elif plan.config.checkpoint.load_weights:
        path = load.weights_at(plan, ranks)
        say(f"weights of {path}; everything else starts anew")
        load.load_weights(plan, ranks, training, path, say)
    return replace(
        start.state,
        data=data,
        config=OmegaConf.to_container(OmegaConf.create(to_yaml(plan.config))),
        layout=load.layout(plan),
        versions={name: version(name) for name in LIBRARIES},
    )


def changed_since(config: Config, state: RunState) -> list[str]:
    """The keys that are part of the mathematics and have another value than in the checkpoint."""
    try:
        before = Config.from_hydra(OmegaConf.create(state.config))
    except (UserError, OmegaConfBaseException):
        return ["its configuration is of another version of mixtrain and was not compared"]
    return [
        f"{change.key} = {show(change.here)} (was {show(change.recipe)})"
        for change in changes(before, config)[MATHEMATICS]
        if change.key not in SAID
    ]


def _of_first(ranks: Ranks, mine: Any) -> Any:
    """The first rank's object, on all ranks."""
    box = [mine]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
