"""The run directory: whether it may be used, its lock, and its start attempts. No torch."""

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
from mixtrain.config.typed_config import from_hydra
from mixtrain.errors import UserError
from mixtrain.system import locks, untrusted_json, yaml_file
from mixtrain.system.status import Ending, read_status, write_status
from mixtrain.system.untrusted_json import Count, InvalidJson

RUN_FILES = ("status.json", "config.yaml", "metrics.jsonl")  # any of them: a run used the directory
LOCK = ".lock"
ATTEMPTS = "attempts.jsonl"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
LENGTH = (
    "trainer.max_steps",
    "optimizer.lr_decay_steps",
)  # may change: a longer run is the same run
IN_A_ROW = "runs in a row started at step"  # in the message of attempts_problem
_locks: set[int] = set()  # file descriptors of this process's locks
# close them in a forked child, which would keep the locks
os.register_at_fork(after_in_child=lambda: [os.close(_locks.pop()) for _ in list(_locks)])


class Attempt(TypedDict):
    """A line of attempts.jsonl."""

    step: Count
    before: NotRequired[Ending | None]


def directory_problems(plan: Plan) -> Iterator[str]:
    """Yield the problems of run_dir that show without writing."""
    # os.path, not pathlib, which raises for a name that is too long
    directory = plan.config.run_dir
    resume = plan.config.checkpoint.resume
    if os.path.exists(directory) and not os.path.isdir(directory):
        yield f"run_dir = {directory} is a file; give another run_dir"
        return
    if resume is Resume.never and holds_run(directory):
        yield taken_message(directory)
    elif resume is Resume.must and not steps_in(directory):
        yield (
            f"checkpoint.resume = must, but run_dir = {directory} holds no checkpoint; use"
            " auto, or another run_dir"
        )
    elif has_done_its_steps(plan) and (changed := changed_mathematics_keys(plan)):
        keys = f"{', '.join(changed[:3])}{' ...' * (len(changed) > 3)}"
        yield f"{taken_message(directory)} (that one has another {keys})"
    elif is_finished(directory) and not has_done_its_steps(plan) and not steps_in(directory):
        message = taken_message(directory)
        yield f"{message} (that one has finished and left no checkpoint to resume from)"


def holds_run(directory: str) -> bool:
    return bool(steps_in(directory)) or any(
        os.path.exists(os.path.join(directory, name)) for name in RUN_FILES
    )


def previous_status(directory: str) -> dict:
    """Return the status.json of the previous run; {} if there is none or it cannot be read."""
    try:
        return read_status(directory) or {}
    except (OSError, InvalidJson):
        return {}


def is_finished(directory: str) -> bool:
    return previous_status(directory).get("state") == "finished"


def has_done_its_steps(plan: Plan) -> bool:
    """Whether the directory's run has finished all steps that trainer.max_steps asks for.

    False with checkpoint.resume = never, which asks for a new run.
    """
    directory = plan.config.run_dir
    if plan.config.checkpoint.resume is Resume.never or not is_finished(directory):
        return False
    return previous_status(directory)["step"] >= plan.config.trainer.max_steps


def finished_already(plan: Plan) -> str | None:
    """Return the message for a run that has no steps left, which is not started; else None."""
    directory = plan.config.run_dir
    if not has_done_its_steps(plan):
        return None
    status = previous_status(directory)
    return (
        f"run_dir = {directory} holds this run, finished after {status['step']} of"
        f" {status['max_steps']} steps; a longer one: trainer.max_steps=..., a new one:"
        f" run_dir={free_name(directory)}"
    )


def changed_mathematics_keys(plan: Plan) -> list[str]:
    """Return the keys of mathematics that differ from run_dir's config.yaml, except its length."""
    try:
        tree = yaml_file.read(os.path.join(plan.config.run_dir, "config.yaml"))
        changed = changes(from_hydra(tree), plan.config)[MATHEMATICS]
    except (OmegaConfBaseException, UserError):
        return []  # damaged, or of another version: the checkpoint is checked when it is loaded
    ignored = LENGTH
    if plan.config.optimizer.lr_warmup_fraction is not None:
        ignored = (*LENGTH, "optimizer.lr_warmup_steps")
    return [change.key for change in changed if change.key not in ignored]


def shared_directories(plans: list[Plan]) -> Iterator[str]:
    """Yield a problem for each directory that several jobs of a sweep would write to."""
    jobs: dict[str, list[str]] = {}
    for number, plan in enumerate(plans, start=1):
        jobs.setdefault(os.path.realpath(plan.config.run_dir), []).append(str(number))
    for numbers in jobs.values():
        if len(numbers) > 1:
            yield (
                f"run_dir = {plans[int(numbers[0]) - 1].config.run_dir} is used by the jobs"
                f" {', '.join(numbers)} of the sweep; type"
                " run_dir='runs/${name}-${hydra:job.num}', or put a swept key into it: ${seed}"
            )


def console_log(plan: Plan, rank: int = 0) -> str:
    """Return the file for output that a closed console did not take.

    One file for the launcher and the first rank, one for each other rank.
    """
    name = f"console_{rank}.log" if rank else "console.log"
    return os.path.join(plan.config.run_dir, "logs", name)


@contextlib.contextmanager
def claim(plan: Plan, folder: str = "") -> Iterator[None]:
    """Create run_dir with `folder` in it; within the block this process holds its lock.

    The lock ends with the process, however it ends. UserError if another process holds it or
    run_dir cannot be written.
    """
    run_dir = plan.config.run_dir
    try:
        Path(run_dir, folder).mkdir(parents=True, exist_ok=True)
        descriptor = locks.open_lock(os.path.join(run_dir, LOCK))
    except (OSError, ValueError) as error:
        raise UserError(_unusable(run_dir, error)) from None
    _locks.add(descriptor)
    try:
        _lock(descriptor, run_dir)
        # again, now under the lock: another process may have used it since directory_problems
        if plan.config.checkpoint.resume is Resume.never and holds_run(run_dir):
            raise UserError(taken_message(run_dir))
        previous = previous_status(run_dir)
        ending = {key: previous.get(key) for key in ("state", "reason")}
        # a run refused by attempts_problem did not run: keep how the run before it ended
        if IN_A_ROW in str(previous.get("reason")):
            ending = previous.get("before") or ending
        try:
            write_status(
                run_dir,
                state="running",
                step=previous.get("step", 0),
                max_steps=plan.config.trainer.max_steps,
                reason="",
                before=ending,
            )
        except OSError as error:
            raise UserError(_unusable(run_dir, error)) from None
        yield
    finally:
        _locks.discard(descriptor)
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
            " detected",
            flush=True,
        )
    try:
        locks.sign(descriptor)
    except OSError as error:
        raise UserError(_unusable(run_dir, error)) from None


def is_in_use(run_dir: str) -> bool:
    """Whether a process holds the lock of run_dir. Writes nothing."""
    try:
        descriptor = os.open(os.path.join(run_dir, LOCK), os.O_RDWR | os.O_NOFOLLOW)
    except PermissionError:
        return True  # another user's, who may be using it
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        os.close(descriptor)
    return False


def taken_message(directory: str) -> str:
    return (
        f"run_dir = {directory} holds a run already; the next free name:"
        f" run_dir={free_name(directory)}"
    )


def free_name(directory: str) -> str:
    """Return the first of directory-2, directory-3 ... that does not exist."""
    number = 2
    while os.path.exists(free := f"{directory}-{number}"):
        number += 1
    return free


def record_attempt(run_dir: str, step: int) -> None:
    """Append to attempts.jsonl that a run starts at `step`, and how the previous run ended."""
    record = {
        "step": step,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "host": socket.gethostname(),
        "before": previous_status(run_dir).get("before") or {},
    }
    with open(os.path.join(run_dir, ATTEMPTS), "a") as file:
        file.write(json.dumps(record) + "\n")


def attempts_problem(run_dir: str, step: int, most: int | None) -> str | None:
    """Return why a run must not start at `step` again, or None.

    The problem: `most` runs in a row started there, and none saved a later step or was asked to
    stop. Without `most` there is no limit.
    """
    last_ending = previous_status(run_dir).get("before") or {}
    endings = [last_ending]
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
    reason = last_ending.get("reason") or "without a message"
    return (
        f"{len(endings) - 1} {IN_A_ROW} {step} and none saved a later one; the last ended:"
        f" {reason}; fix that, or try again with checkpoint.max_attempts=null"
    )


def _unusable(run_dir: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    where = f"{LOCK}: " if str(getattr(error, "filename", None)).endswith(LOCK) else ""
    return f"run_dir = {run_dir} cannot be made or written ({where}{reason}); give another run_dir"
