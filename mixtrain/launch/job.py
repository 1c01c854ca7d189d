"""What a job's script runs before and after its ranks: `python -m mixtrain.launch.job`. No torch.

    begin OVERRIDES       prints a line for the script: nodes, ranks per node, run_dir on the host
    end CODE OVERRIDES    reports how the ranks, with exit code CODE, ended; prints the job's exit
                          code, or `return`

Rule: a job returns to the queue only if its run was stopped before its last step and status.json
says so, never after a failure, and at most launcher.max_requeues times in a row at the same step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TypedDict

from mixtrain.characters import escaped
from mixtrain.checkpoint.write_errors import recovery_advice
from mixtrain.config.choices import Mode
from mixtrain.config.compose import compose
from mixtrain.config.jobs import plan_of
from mixtrain.config.plan import Plan
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems
from mixtrain.launch import containers
from mixtrain.launch.local import failure_message, read_text
from mixtrain.launch.script import CHANGING, ROOT
from mixtrain.system import untrusted_json
from mixtrain.system.closed_pipe import run_main
from mixtrain.system.status import try_write_status
from mixtrain.system.untrusted_json import Count, InvalidJson
from mixtrain.training.preflight import with_records_dir
from mixtrain.training.run_directory import is_in_use, previous_status

RETURN = "return"  # to the queue
RETURNS = "returns.jsonl"  # beside the ranks' logs: the step of each return


class Return(TypedDict):
    """A line of returns.jsonl."""

    step: Count


def main(arguments: list[str]) -> int:
    try:
        command, *rest = arguments
        if command == "begin":
            return begin(compose_plan(rest), rest)
        print(end(compose_plan(rest[1:]), int(rest[0])))
        return FINISHED
    except UserError as error:
        print_problems(error.problems)
        return REFUSED


def compose_plan(overrides: list[str]) -> Plan:
    jobs, problems = compose(overrides)
    if len(jobs) != 1:
        raise UserError(
            *problems, "a job is one run: no --multirun here; tools/submit.py sends a job for each"
        )
    return plan_of(jobs[0], problems)


def begin(plan: Plan, overrides: list[str]) -> int:
    """Print what the script needs to start the ranks. UserError if Slurm gave other nodes."""
    nodes = plan.config.trainer.num_nodes
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if nodes != allocated:
        raise UserError(
            f"this job has {allocated} nodes, but trainer.num_nodes = {nodes};"
            f" sbatch --nodes={nodes}"
        )
    if any(text in override for text in CHANGING for override in overrides):
        raise UserError(
            "${now:} and ${hydra:} give another run_dir every time that the job returns; type what"
            " you mean"
        )
    run_dir = _run_dir_on_host(plan, with_records_dir(plan).config.run_dir)
    print("\t".join((str(nodes), str(plan.config.trainer.devices), run_dir)))
    return FINISHED


def _run_dir_on_host(plan: Plan, run_dir: str) -> str:
    """Return the host's path of run_dir, for the script, which runs outside the container."""
    folder = Path.cwd()
    if not plan.config.launcher.container_image:
        return str(folder / run_dir)
    mounts = containers.mounts_of(plan.config, folder, ROOT)
    return containers.on_host(os.path.join(folder, run_dir), mounts) or str(folder / run_dir)


def end(plan: Plan, code: int) -> int | str:
    """Report on stderr how the ranks ended; return RETURN, or the exit code of the job."""
    run_dir = Path(with_records_dir(plan).config.run_dir)
    logs = run_dir / "logs" / f"job_{os.environ['SLURM_JOB_ID']}"
    status = previous_status(str(run_dir))
    if code:
        return report_failure(plan, run_dir, logs, status, code)
    if status.get("state") != "stopped" or plan.config.trainer.mode is not Mode.train:
        say(
            f"mixtrain: {status.get('state', 'ended')} after {status.get('step', 0)} steps; see"
            f" {run_dir}"
        )
        return FINISHED
    step = status["step"]
    reason = status.get("reason")
    if not plan.saves:
        say(
            f"mixtrain: {reason}, after {step} steps; none of them was saved (checkpoint), so it"
            " does not return"
        )
        return FINISHED
    most = plan.config.launcher.max_requeues
    if has_no_requeue_left(logs, step, most):
        message = f"{reason}; returned {most} times and came no further than step {step}"
        say(f"mixtrain: {message}; give it more launcher.time, or launcher.max_requeues")
        replace_status(plan, run_dir, {**status, "reason": message})
        return FAULT
    record = {"step": step, "reason": reason, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with open(logs / RETURNS, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:  # an uncounted return could repeat forever
        say(
            f"mixtrain: {reason}, after {step} steps; {logs / RETURNS} cannot be written"
            f" ({error.strerror}),"
        )
        say(f"  so this job does not return; {recovery_advice(plan, error.errno)}")
        return FAULT
    say(f"mixtrain: {reason}, after {step} of {status['max_steps']} steps: returning to the queue")
    return RETURN


def has_no_requeue_left(logs: Path, step: int, most: int) -> bool:
    """Return whether the last `most` returns were at this step, or later (a lost checkpoint)."""
    steps = []
    for _, line in untrusted_json.lines(logs / RETURNS) if (logs / RETURNS).exists() else ():
        with contextlib.suppress(InvalidJson):
            steps.append(untrusted_json.parse(line, Return)["step"])
    return len(steps) >= most and all(before >= step for before in steps[len(steps) - most :])


def report_failure(plan: Plan, run_dir: Path, logs: Path, status: dict, code: int) -> int:
    """Name the rank that failed first, in the job's log, and in status.json if no rank did."""
    srun = read_text(logs / "srun.log")
    srun_errors = [
        f"rank {tasks} on {node}: {message}"
        for node, tasks, message in re.findall(r"error: (\S+): tasks? ([\d,-]+): (.+)", srun)
    ]
    say(f"mixtrain: the ranks have failed (exit code {code}); this job does not return")
    for line in srun_errors[:4]:
        say(f"  {line}")
    reason = srun_errors[0] if srun_errors else f"exit code {code}"
    with_message = [
        path for path in sorted(logs.glob("rank_*.log")) if "mixtrain: " in read_text(path)[-4000:]
    ]
    if with_message:
        log = with_message[0]
        rank = int(re.findall(r"\d+", log.name)[-1])
        lines, reason = failure_message(rank, code, log, None, read_text(log))
        say("\n".join(lines))
    elif status.get("state") == "failed":  # a full disk took no log, but status.json
        say(f"mixtrain: {status['reason']}")
    say(f"  all logs: {logs}")
    # if the directory is in use, the status is another run's
    if status.get("state") == "running" and not is_in_use(str(run_dir)):
        replace_status(plan, run_dir, {**status, "state": "failed", "reason": reason})
    return REFUSED if code == REFUSED else FAULT


def replace_status(plan: Plan, run_dir: Path, status: dict) -> None:
    """Replace status.json; if that fails, write its message to the job's log."""
    if (error := try_write_status(run_dir, **status)) is not None:
        unwritten = f"status.json cannot be written ({error.strerror}) and does not say so"
        say(f"mixtrain: {status['reason']}; {unwritten}; {recovery_advice(plan, error.errno)}")


def say(message: str) -> None:
    print(escaped(message, keep="\n\t"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # a stop request of the job is for its ranks; these commands take about a second
        signal.signal(number, signal.SIG_IGN)
    sys.exit(run_main(main, sys.argv[1:]))
