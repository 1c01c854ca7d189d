"""Where a run starts: its newest checkpoint, the weights of another one, or step 0.

Rule: what changed since the checkpoint is reported or refused before anything of the previous run
is modified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixtrain.checkpoint import directory, load
from mixtrain.checkpoint.state import RunState, state_of
from mixtrain.config import lr_schedule
from mixtrain.config.key_effects import MATHEMATICS, Change, changes, show
from mixtrain.config.plan import Plan, schedule_in_steps
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import from_hydra, to_yaml
from mixtrain.data.fingerprint import difference
from mixtrain.engine.optimizer import Training
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import UserError
from mixtrain.system import collectives
from mixtrain.training.run_directory import attempts_problem, record_attempt

LIBRARIES = ("megatron-core", "torch")
NOT_REPORTED = ("checkpoint.load_weights", "trainer.max_steps")  # changes of these keys
SCHEDULE = (
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.lr_decay_style",
    "optimizer.lr_decay_steps",
    "optimizer.lr_warmup_steps",
    "optimizer.lr_wsd_decay_style",
    "optimizer.lr_wsd_decay_steps",
)


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run resumes from and its state; (None, RunState()) for a new run."""

    path: Path | None
    state: RunState


def find(plan: Plan, ranks: Ranks, say: Callable[[str], None]) -> Start:
    """Find the checkpoint to resume from. Every rank must call."""
    if ranks.is_first:
        directory.remove_leftovers(plan.config.run_dir)
    path = load.find_checkpoint(plan, ranks, say)
    state = RunState() if path is None else state_of(path)
    if state.step > plan.config.trainer.max_steps:
        raise UserError(
            f"trainer.max_steps = {plan.config.trainer.max_steps}, but {path} has {state.step}"
            f" steps already; use more than {state.step}, or another run_dir"
        )
    return Start(path, state)


def refuse_a_crash_loop(plan: Plan, ranks: Ranks, start: Start) -> None:
    """Record that this run starts; UserError if checkpoint.max_attempts runs in a row failed here.

    Every rank must call.
    """
    run_dir = plan.config.run_dir
    problem = None
    if ranks.is_first and plan.saves:
        problem = attempts_problem(run_dir, start.state.step, plan.config.checkpoint.max_attempts)
        try:
            if not problem:
                record_attempt(run_dir, start.state.step)
        except OSError as error:
            problem = f"run_dir = {run_dir}: {error.filename} cannot be written ({error.strerror})"
    if problem := collectives.from_first(lambda: problem):
        raise UserError(problem)


def enter(
    plan: Plan,
    ranks: Ranks,
    training: Training,
    start: Start,
    data: dict[str, str],
    say: Callable[[str], None],
) -> RunState:
    """Load what the run starts from; return its RunState for its own checkpoints.

    `data`: the fingerprint of the training data, on the first rank. Every rank must call.
    """
    data = collectives.from_first(lambda: data)
    state = start.state
    if start.path:
        if changed := difference(state.data, data):
            raise UserError(
                f"{start.path} was trained on other data: {changed};"
                f" checkpoint.load_weights={start.path} in a new run_dir starts a new run from its"
                " weights"
            )
        load.resume(plan, ranks, training, start.path, state, say)
        say(
            f"resumed from {start.path}, after {state.step} steps and"
            f" {state.consumed_samples:,} sequences"
        )
        for line in changed_since(plan.config, state):
            say(f"changed since then: {line}")
    elif plan.config.checkpoint.load_weights:
        path = load.find_weights(plan, ranks)
        say(f"weights of {path}; everything else starts from step 0")
        load.load_weights(plan, ranks, training, path, say)
        state = replace(state, hf_source=state_of(path).hf_source)
    return replace(
        state,
        data=data,
        config=OmegaConf.to_container(OmegaConf.create(to_yaml(plan.config))),
        layout=load.layout(plan),
        versions={name: version(name) for name in LIBRARIES},
    )


def changed_since(config: Config, state: RunState) -> list[str]:
    """Return a line for each key of the mathematics whose value differs from the checkpoint's.

    The last line gives the first learning rate that changes with it.
    """
    try:
        before = from_hydra(OmegaConf.create(state.config))
    except (UserError, OmegaConfBaseException):
        return ["its configuration is of another version of mixtrain and was not compared"]
    changed = [
        change for change in changes(before, config)[MATHEMATICS] if change.key not in NOT_REPORTED
    ]
    lines = [
        f"{change.key} = {show(change.value)} (was {show(change.recipe)})" for change in changed
    ]
    schedule_changes = [change for change in changed if change.key in SCHEDULE]
    return lines + changed_rate(before, config, state, schedule_changes)


def changed_rate(
    before: Config, config: Config, state: RunState, schedule_changes: list[Change]
) -> list[str]:
    """Return a line: the first learning rate that changes and the overrides that keep it."""
    if not schedule_changes:
        return []
    was = schedule_in_steps(before)
    now = config.optimizer
    if not lr_schedule.is_valid(was):
        return ["its configuration has no valid schedule, and the learning rates were not compared"]
    ahead = (state.schedule_steps + n for n in range(config.trainer.max_steps - state.step))
    done = next((n for n in ahead if lr_schedule.rate(was, n) != lr_schedule.rate(now, n)), None)
    if done is None:
        return []
    keys = {change.key: show(change.recipe) for change in schedule_changes}
    follows = ""
    if "optimizer.lr_decay_steps" in keys and now == schedule_in_steps(_with_open_decay(config)):
        follows = (
            f": trainer.max_steps is {config.trainer.max_steps}, and"
            " optimizer.lr_decay_steps = null follows it"
        )
        if now.lr_warmup_fraction is not None:
            keys.pop("optimizer.lr_warmup_steps", None)  # follows max_steps too
    overrides = " ".join(f"{key}={value}" for key, value in keys.items())
    return [
        f"the learning rate of step {state.step + done - state.schedule_steps + 1} is"
        f" {lr_schedule.rate(now, done):.3e} (was {lr_schedule.rate(was, done):.3e}){follows}; to"
        f" keep it, type {overrides}"
    ]


def _with_open_decay(config: Config) -> Config:
    return replace(config, optimizer=replace(config.optimizer, lr_decay_steps=None))
