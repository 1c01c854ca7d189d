"""The directory of a run: which one may be given, and that one run alone takes it. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mixtrain.errors import UserError
from mixtrain.plan import Plan
from mixtrain.status import write_status

RUN_FILES = ("status.json", "config.yaml", "metrics.jsonl")  # one of them: a run was here


def directory_problems(plan: Plan) -> Iterator[str]:
    """What can be said of run_dir without writing. os.path: pathlib raises for a name that is too long."""
    directory = plan.config.run_dir
    if os.path.exists(directory) and not os.path.isdir(directory):
        yield f"run_dir = {directory} is a file; give another run_dir"
    elif any(os.path.exists(os.path.join(directory, name)) for name in RUN_FILES):
        yield taken(directory)


def shared_directories(plans: list[Plan]) -> Iterator[str]:
    """Jobs of a sweep that would write to one directory."""
    jobs: dict[str, list[str]] = {}
    for number, plan in enumerate(plans, start=1):
        jobs.setdefault(os.path.realpath(plan.config.run_dir), []).append(str(number))
    for numbers in jobs.values():
        if len(numbers) > 1:
            yield (
                f"run_dir = {plans[int(numbers[0]) - 1].config.run_dir} is that of the jobs {', '.join(numbers)} of the"
                " sweep; type run_dir='runs/${name}-${hydra:job.num}', or put a swept key into it: ${seed}"
            )


def claim(plan: Plan, folder: str = "") -> None:
    """Make run_dir, and a folder in it, and take it. Of two runs that start at once only one can create status.json."""
    run_dir = plan.config.run_dir
    try:
        Path(run_dir, folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(_unusable(run_dir, error)) from None
    try:
        open(Path(run_dir, "status.json"), "x").close()
        write_status(run_dir, state="running", step=0, max_steps=plan.config.trainer.max_steps, reason="")
    except FileExistsError:
        raise UserError(taken(run_dir)) from None
    except OSError as error:
        raise UserError(_unusable(run_dir, error)) from None


def taken(directory: str) -> str:
    return f"run_dir = {directory} holds a run already; the next free name: run_dir={free_name(directory)}"


def free_name(directory: str) -> str:
    """The first of directory-2, directory-3 ... that no run has taken."""
    number = 2
    while os.path.exists(free := f"{directory}-{number}"):
        number += 1
    return free


def _unusable(run_dir: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"run_dir = {run_dir} cannot be made or written ({reason}); give another run_dir"
