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
from mixtrain.config import lr_schedule
from mixtrain.config.key_effects import MATHEMATICS, Change, changes, show
from mixtrain.config.plan import Plan, schedule_in_steps
from mixtrain.config.schema import Config, to_yaml
from mixtrain.data.fingerprint import difference
from mixtrain.engine.optimizer import Training
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import UserError
from mixtrain.training.run_directory import attempts_problem, record_attempt

LIBRARIES = ("megatron-core", "torch")
SAID = ("checkpoint.load_weights", "trainer.max_steps")  # changes that need no word
SCHEDULE = tuple(f"optimizer.{name}" for name in (
    "lr", "min_lr", "lr_decay_style", "lr_decay_steps", "lr_warmup_steps", "lr_wsd_decay_style", "lr_wsd_decay_steps",
))  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The checkpoint a run goes on from, and where that is; (None, RunState()) at the beginning."""

    path: Path | None
    state: RunState


def find(plan: Plan, ranks: Ranks, say: Callable[[str], None]) -> Start:
    """Look for the checkpoint to go on from. Every rank must call."""
    if ranks.is_first:
        directory.remove_leftovers(plan.config.run_dir)
    path = load.find_checkpoint(plan, ranks, say)
    state = RunState() if path is None else load.read_state(path)
    if state.step > plan.config.trainer.max_steps:
        raise UserError(
            f"trainer.max_steps = {plan.config.trainer.max_steps}, but {path} has {state.step}"
            f" steps already; use more than {state.step}, or another run_dir"
        )
    return Start(path, state)


def refuse_a_crash_loop(plan: Plan, ranks: Ranks, start: Start) -> None:
    """UserError if run after run has started here and died; note that this one starts. Every rank must call."""
    run_dir = plan.config.run_dir
    most = plan.config.checkpoint.max_attempts
    problem = None
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
    plan: Plan,
    ranks: Ranks,
    training: Training,
    start: Start,
    data: dict[str, str],
    say: Callable[[str], None],
) -> RunState:
    """Bring the run to its start; where it is then, with all that its own checkpoints will say of it.

    `data` is the fingerprint of the training data, on the first rank.
    """
    data = _of_first(ranks, data)
    if start.path:
        if changed := difference(start.state.data, data):
            raise UserError(
                f"{start.path} was trained on other data: {changed};"
                f" checkpoint.load_weights={start.path} in a new run_dir starts a new run from its"
                " weights"
            )
        load.resume(plan, ranks, training, start.path, start.state, say)
        say(
            f"resumed from {start.path}, after {start.state.step} steps and"
            f" {start.state.consumed_samples:,} sequences"
        )
        for line in changed_since(plan.config, start.state):
            say(f"changed since then: {line}")
    elif plan.config.checkpoint.load_weights:
        path = load.find_weights(plan, ranks)
        say(f"weights of {path}; everything else starts anew")
        load.load_weights(plan, ranks, training, path, say)
        start = replace(
            start, state=replace(start.state, hf_source=load.read_state(path).hf_source)
        )
    return replace(
        start.state,
        data=data,
        config=OmegaConf.to_container(OmegaConf.create(to_yaml(plan.config))),
        layout=load.layout(plan),
        versions={name: version(name) for name in LIBRARIES},
    )


def changed_since(config: Config, state: RunState) -> list[str]:
    """The keys that are part of the mathematics and have another value than in the checkpoint, and what that does."""
    try:
        before = Config.from_hydra(OmegaConf.create(state.config))
    except (UserError, OmegaConfBaseException):
        return ["its configuration is of another version of mixtrain and was not compared"]
    found = [change for change in changes(before, config)[MATHEMATICS] if change.key not in SAID]
    lines = [f"{change.key} = {show(change.here)} (was {show(change.recipe)})" for change in found]
    return lines + other_rate(
        before, config, state, [change for change in found if change.key in SCHEDULE]
    )


def other_rate(before: Config, config: Config, state: RunState, found: list[Change]) -> list[str]:
    """The first learning rate that is not what it would have been, and what to type to have that.

    `found`: what has changed of the schedule.
    """
    if not found:
        return []
    was = schedule_in_steps(before)
    now = config.optimizer
    if not lr_schedule.is_one(was):
        return [
            "the schedule of its configuration is none, and the learning rates were not compared"
        ]
    ahead = (state.schedule_steps + n for n in range(config.trainer.max_steps - state.step))
    done = next((n for n in ahead if lr_schedule.rate(was, n) != lr_schedule.rate(now, n)), None)
    if done is None:
        return []
    keys = {change.key: show(change.recipe) for change in found}
    follows = ""
    if "optimizer.lr_decay_steps" in keys and now == schedule_in_steps(_with_open_decay(config)):
        follows = (
            f": trainer.max_steps is {config.trainer.max_steps}, and"
            " optimizer.lr_decay_steps = null follows it"
        )
        if now.lr_warmup_fraction is not None:
            keys.pop("optimizer.lr_warmup_steps", None)  # so does this
    words = " ".join(f"{key}={value}" for key, value in keys.items())
    return [
        f"the learning rate of step {state.step + done - state.schedule_steps + 1} is"
        f" {lr_schedule.rate(now, done):.3e} (was {lr_schedule.rate(was, done):.3e}){follows}; to"
        f" keep it, type {words}"
    ]


def _with_open_decay(config: Config) -> Config:
    return replace(config, optimizer=replace(config.optimizer, lr_decay_steps=None))


def _of_first(ranks: Ranks, mine: Any) -> Any:
    """The first rank's object, on all ranks."""
    box = [mine]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
