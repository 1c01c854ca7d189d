"""The directory of a run: which may be given, that one job alone works in it, how often it was tried. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from omegaconf.errors import OmegaConfBaseException

from mixtrain.checkpoint.directory import steps_in
from mixtrain.config.choices import Resume
from mixtrain.config.key_effects import MATHEMATICS, changes
from mixtrain.config.plan import Plan
from mixtrain.config.schema import Config
from mixtrain.errors import UserError
from mixtrain.system import locks, untrusted_json, yaml_file
from mixtrain.system.status import Ending, read_status, write_status
from mixtrain.system.untrusted_json import Count, InvalidJson

RUN_FILES = ("status.json", "config.yaml", "metrics.jsonl")  # one of them: a run was here
LOCK = ".lock"
ATTEMPTS = "attempts.jsonl"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
LENGTH = ("trainer.max_steps", "optimizer.lr_decay_steps")  # a longer run is the same run
IN_A_ROW = "runs in a row started at step"  # in the words of a run that was refused for it
_held: set[int] = set()  # the locks of this process
# a child would keep them
os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _ in list(_held)])


class Attempt(TypedDict):
    """A line of attempts.jsonl."""

    step: Count
    before: NotRequired[Ending | None]


def directory_problems(plan: Plan) -> Iterator[str]:
    """What can be said of run_dir without writing. os.path: pathlib raises for a name that is too long."""
    directory = plan.config.run_dir
    resume = plan.config.checkpoint.resume
    if os.path.exists(directory) and not os.path.isdir(directory):
        yield f"run_dir = {directory} is a file; give another run_dir"
        return
    if resume is Resume.never and holds_run(directory):
        yield taken(directory)
    elif resume is Resume.must and not steps_in(directory):
        yield (
            f"checkpoint.resume = must, but run_dir = {directory} holds no checkpoint; use"
            " auto, or another run_dir"
        )
    elif has_done_its_steps(plan) and (others := other_mathematics(plan)):
        yield (
            f"{taken(directory)} (that one has another"
            f" {', '.join(others[:3])}{' ...' * (len(others) > 3)})"
        )
    elif is_finished(directory) and not has_done_its_steps(plan) and not steps_in(directory):
        yield f"{taken(directory)} (that one has finished, and left no checkpoint to go on from)"


def holds_run(directory: str) -> bool:
    return bool(steps_in(directory)) or any(
        os.path.exists(os.path.join(directory, name)) for name in RUN_FILES
    )


def former(directory: str) -> dict:
    """What status.json says of the run before this one; {} if there is none, or nothing that can be read."""
    try:
        found = read_status(directory)
    except (OSError, InvalidJson):
        return {}
    return found or {}


def is_finished(directory: str) -> bool:
    return former(directory).get("state") == "finished"


def has_done_its_steps(plan: Plan) -> bool:
    """The run in the directory has finished, and trainer.max_steps asks for no more steps than it has done."""
    directory = plan.config.run_dir
    never = plan.config.checkpoint.resume is Resume.never
    return (
        not never
        and is_finished(directory)
        and former(directory)["step"] >= plan.config.trainer.max_steps
    )


def finished_already(plan: Plan) -> str | None:
    """The line for a run that has done all its steps, which is then not started again; None if there are some to do."""
    directory = plan.config.run_dir
    status = former(plan.config.run_dir)
    if not has_done_its_steps(plan):
        return None
    return (
        f"run_dir = {directory} holds this run, finished after {status['step']} of"
        f" {status['max_steps']} steps; a longer one: trainer.max_steps=..., a new one:"
        f" run_dir={free_name(directory)}"
    )


def other_mathematics(plan: Plan) -> list[str]:
    """The keys of mathematics that have another value in the directory's config.yaml, but for the run's length."""
    try:
        tree = yaml_file.read(os.path.join(plan.config.run_dir, "config.yaml"))
        found = changes(Config.from_hydra(tree), plan.config)[MATHEMATICS]
    except (OmegaConfBaseException, UserError):
        return []  # damaged, or of another version: a checkpoint will show what fits
    length = (
        LENGTH
        if plan.config.optimizer.lr_warmup_fraction is None
        else (*LENGTH, "optimizer.lr_warmup_steps")
    )
    return [change.key for change in found if change.key not in length]


def shared_directories(plans: list[Plan]) -> Iterator[str]:
    """Jobs of a sweep that would write to one directory."""
    jobs: dict[str, list[str]] = {}
    for number, plan in enumerate(plans, start=1):
        jobs.setdefault(os.path.realpath(plan.config.run_dir), []).append(str(number))
    for numbers in jobs.values():
        if len(numbers) > 1:
            yield (
                f"run_dir = {plans[int(numbers[0]) - 1].config.run_dir} is that of the jobs"
                f" {', '.join(numbers)} of the sweep; type"
                " run_dir='runs/${name}-${hydra:job.num}', or put a swept key into it: ${seed}"
            )


def console_log(plan: Plan, rank: int = 0) -> str:
    """What a console that is gone did not take: of the launcher and the first rank, or of another rank."""
    return os.path.join(
        plan.config.run_dir, "logs", f"console_{rank}.log" if rank else "console.log"
    )


@contextlib.contextmanager
def claimed(plan: Plan, folder: str = "") -> Iterator[None]:
    """Within the block run_dir, made with a folder in it, is this process's: a lock that ends with it, however it ends.

    UserError if another process has it, or it cannot be written.
    """
    run_dir = plan.config.run_dir
    try:
        Path(run_dir, folder).mkdir(parents=True, exist_ok=True)
        descriptor = locks.open_lock(os.path.join(run_dir, LOCK))
    except (OSError, ValueError) as error:
        raise UserError(_unusable(run_dir, error)) from None
    _held.add(descriptor)
    try:
        _lock(descriptor, run_dir)
        # it was free when it was looked at
        if plan.config.checkpoint.resume is Resume.never and holds_run(run_dir):
            raise UserError(taken(run_dir))
        before = former(run_dir)
        ended = {key: before.get(key) for key in ("state", "reason")}
        # it has not run: what counts is how the one before it ended
        if IN_A_ROW in str(before.get("reason")):
            ended = before.get("before") or ended
        try:
            write_status(
                run_dir,
                state="running",
                step=before.get("step", 0),
                max_steps=plan.config.trainer.max_steps,
                reason="",
                before=ended,
            )
        except OSError as error:
            raise UserError(_unusable(run_dir, error)) from None
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, run_dir: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"run_dir = {run_dir} is in use by {locks.holder(descriptor)}; wait for it, or give"
            f" another: run_dir={free_name(run_dir)}"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(_unusable(run_dir, error)) from None
        print(
            f"warning: the file system of {run_dir} has no locks; a second job there would not be"
            " noticed",
            flush=True,
        )
    try:
        locks.sign(descriptor)
    except OSError as error:
        raise UserError(_unusable(run_dir, error)) from None


def is_in_use(run_dir: str) -> bool:
    """Whether a process has claimed run_dir. Nothing is written."""
    try:
        descriptor = os.open(os.path.join(run_dir, LOCK), os.O_RDWR | os.O_NOFOLLOW)
    except PermissionError:
        return True  # it is another user's, who may be using it
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        os.close(descriptor)
    return False


def taken(directory: str) -> str:
    return (
        f"run_dir = {directory} holds a run already; the next free name:"
        f" run_dir={free_name(directory)}"
    )


def free_name(directory: str) -> str:
    """The first of directory-2, directory-3 ... that no run has taken."""
    number = 2
    while os.path.exists(free := f"{directory}-{number}"):
        number += 1
    return free


def record_attempt(run_dir: str, step: int) -> None:
    """Note that a run starts at `step`, and how the one before it ended."""
    before = former(run_dir).get("before") or {}
    line = {
        "step": step,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "host": socket.gethostname(),
        "before": before,
    }
    with open(os.path.join(run_dir, ATTEMPTS), "a") as file:
        file.write(json.dumps(line) + "\n")


def attempts_problem(run_dir: str, step: int, most: int | None) -> str | None:
    """Why a run should not start at `step` again: `most` in a row did, and none came further or was asked to stop."""
    before = former(run_dir).get("before") or {}
    endings = [before]
    path = os.path.join(run_dir, ATTEMPTS)
    for _, line in reversed(list(untrusted_json.lines(path)) if os.path.exists(path) else []):
        try:
            attempt = untrusted_json.parse(line, Attempt)
        except InvalidJson:
            break
        if attempt["step"] != step or endings[-1].get("state") in ("stopped", "finished"):
            break
        endings.append(attempt.get("before") or {})
    if most is None or len(endings) - 1 < most:
        return None
    reason = before.get("reason") or "without a word"
    return (
        f"{len(endings) - 1} {IN_A_ROW} {step} and none saved a later one; the last ended:"
        f" {reason}; mend that, or try again with checkpoint.max_attempts=null"
    )


def _unusable(run_dir: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    where = f"{LOCK}: " if str(getattr(error, "filename", None)).endswith(LOCK) else ""
    return f"run_dir = {run_dir} cannot be made or written ({where}{reason}); give another run_dir"
