"""What a job's script asks before its ranks start and after they have ended: `python -m mixtrain.launch.job`. No torch.

    begin WORDS       one line for the script to read: nodes, ranks a node, run_dir on the host
    end CODE WORDS    what became of the ranks, which ended with CODE; on stdout the job's exit code, or `return`

Rule: a job comes back only if its run was stopped before its last step and says so itself (status.json), never after a
failure, and not more than launcher.max_requeues times in a row without having come a step further.
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
from mixtrain.launch.local import last_words, read_text
from mixtrain.launch.script import NOW, ROOT
from mixtrain.system import untrusted_json
from mixtrain.system.closed_pipe import ended
from mixtrain.system.status import try_write_status
from mixtrain.system.untrusted_json import Count, InvalidJson
from mixtrain.training.preflight import recorded
from mixtrain.training.run_directory import former, is_in_use

RETURN = "return"  # to the queue
RETURNS = "returns.jsonl"  # beside the ranks' logs: the step of each return


class Return(TypedDict):
    """A line of returns.jsonl."""

    step: Count


def main(arguments: list[str]) -> int:
    try:
        verb, *rest = arguments
        if verb == "begin":
            return begin(planned(rest), rest)
        print(end(planned(rest[1:]), int(rest[0])))
        return FINISHED
    except UserError as error:
        print_problems(error.problems)
        return REFUSED


def planned(words: list[str]) -> Plan:
    jobs, problems = compose(words)
    if len(jobs) != 1:
        raise UserError(
            *problems, "a job is one run: no --multirun here; tools/submit.py sends a job for each"
        )
    return plan_of(jobs[0], problems)


def begin(plan: Plan, words: list[str]) -> int:
    """Print what the script needs to start the ranks. UserError if Slurm has given other nodes than the plan's."""
    nodes = plan.config.trainer.num_nodes
    given = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if nodes != given:
        raise UserError(
            f"this job has {given} nodes, but trainer.num_nodes = {nodes}; sbatch --nodes={nodes}"
        )
    if any(text in word for text in NOW for word in words):
        raise UserError(
            "${now:} and ${hydra:} give another run_dir every time that the job returns; type what"
            " you mean"
        )
    run_dir = _outside(plan, recorded(plan).config.run_dir)
    print("\t".join((str(nodes), str(plan.config.trainer.devices), run_dir)))
    return FINISHED


def _outside(plan: Plan, run_dir: str) -> str:
    """run_dir as the script sees it, which runs on the host."""
    folder = Path.cwd()
    if not plan.config.launcher.container_image:
        return str(folder / run_dir)
    mounts = containers.mounts_of(plan.config, folder, ROOT)
    return containers.on_host(os.path.join(folder, run_dir), mounts) or str(folder / run_dir)


def end(plan: Plan, code: int) -> int | str:
    """Say on stderr what became of the ranks; RETURN, or the exit code of the job."""
    run_dir = Path(recorded(plan).config.run_dir)
    logs = run_dir / "logs" / f"job_{os.environ['SLURM_JOB_ID']}"
    status = former(str(run_dir))
    if code:
        return failed(plan, run_dir, logs, status, code)
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
    if too_often(logs, step, plan.config.launcher.max_requeues):
        words = (
            f"{reason}; returned {plan.config.launcher.max_requeues} times and came no"
            f" further than step {step}"
        )
        say(f"mixtrain: {words}; give it more launcher.time, or launcher.max_requeues")
        leave(plan, run_dir, {**status, "reason": words})
        return FAULT
    try:
        with open(logs / RETURNS, "a") as file:
            file.write(
                json.dumps(
                    {"step": step, "reason": reason, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
                )
                + "\n"
            )
    except OSError as error:  # returns that are not counted have no end
        say(
            f"mixtrain: {reason}, after {step} steps; {logs / RETURNS} cannot be written"
            f" ({error.strerror}),"
        )
        say(f"  so this job does not return; {recovery_advice(plan, error.errno)}")
        return FAULT
    say(f"mixtrain: {reason}, after {step} of {status['max_steps']} steps: returning to the queue")
    return RETURN


def too_often(logs: Path, step: int, most: int) -> bool:
    """The last `most` returns of this job were at this step, or beyond it (its checkpoint was lost)."""
    steps = []
    for _, line in untrusted_json.lines(logs / RETURNS) if (logs / RETURNS).exists() else ():
        with contextlib.suppress(InvalidJson):
            steps.append(untrusted_json.parse(line, Return)["step"])
    return len(steps) >= most and all(before >= step for before in steps[len(steps) - most :])


def failed(plan: Plan, run_dir: Path, logs: Path, status: dict, code: int) -> int:
    """Name the rank that failed first, in the job's log and, where the ranks could not say it, in status.json."""
    srun = read_text(logs / "srun.log")
    named = re.findall(r"error: (\S+): tasks? ([\d,-]+): (.+)", srun)
    say(f"mixtrain: the ranks have failed (exit code {code}); this job does not return")
    for node, tasks, words in named[:4]:
        say(f"  rank {tasks} on {node}: {words}")
    spoke = [
        path for path in sorted(logs.glob("rank_*.log")) if "mixtrain: " in read_text(path)[-4000:]
    ]
    reason = (
        "; ".join(f"rank {tasks} on {node}: {words}" for node, tasks, words in named[:1])
        or f"exit code {code}"
    )
    for path in spoke[:1]:
        lines, reason = last_words(
            int(re.findall(r"\d+", path.name)[-1]), code, path, None, read_text(path)
        )
        say("\n".join(lines))
    if not spoke and status.get("state") == "failed":  # a full disk has taken no log, but this
        say(f"mixtrain: {status['reason']}")
    say(f"  all logs: {logs}")
    if status.get("state") == "running" and not is_in_use(str(run_dir)):  # else it is another run's
        leave(plan, run_dir, {**status, "state": "failed", "reason": reason})
    return REFUSED if code == REFUSED else FAULT


def leave(plan: Plan, run_dir: Path, status: dict) -> None:
    """Replace status.json; where that cannot be, the job's log has to do."""
    if (wrong := try_write_status(run_dir, **status)) is not None:
        unwritten = f"status.json cannot be written ({wrong.strerror}) and does not say so"
        say(f"mixtrain: {status['reason']}; {unwritten}; {recovery_advice(plan, wrong.errno)}")


def say(words: str) -> None:
    print(escaped(words, keep="\n\t"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # the job is asked to stop: that is the ranks' to do, this takes a second
        signal.signal(number, signal.SIG_IGN)
    sys.exit(ended(main, sys.argv[1:]))
