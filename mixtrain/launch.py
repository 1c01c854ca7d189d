"""Start this node's ranks, pass signals on to them, and return their verdict. No torch.

Rule: a rank is a process group of its own; none outlives the launcher, and no wait is unbounded once one has failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixtrain.environment import OWN_RENDEZVOUS
from mixtrain.errors import FAULT, FINISHED, REFUSED
from mixtrain.plan import Plan
from mixtrain.status import read_status, write_status

GRACE_SECONDS = 20  # what the other ranks get to notice that one has failed, before they are killed
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
QUIET = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # one node: nothing listens beyond it


def start(plan: Plan, overrides: list[str]) -> int:
    """Run `train.py overrides` on plan.world_size processes of this node; their exit code as one."""
    logs = Path(plan.config.run_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mixtrain-") as folder:
        asked: list[int] = []  # signals that asked for the end
        ranks = [_start_rank(plan, overrides, rank, Path(folder), logs) for rank in range(plan.world_size)]
        restore = [(number, signal.signal(number, _forward(ranks, asked))) for number in FORWARDED]
        try:
            failed = _wait(ranks)
        finally:
            _kill(ranks)
            for number, handler in restore:
                signal.signal(number, handler)
    if failed is None:
        return FINISHED
    if ranks[failed].returncode in [-number for number in asked]:  # it had not come as far as to note the signal
        print("mixtrain: stopped before the first step", file=sys.stderr)
        return FINISHED
    return _report(plan, failed, ranks[failed].returncode, logs)


def _start_rank(plan: Plan, overrides: list[str], rank: int, folder: Path, logs: Path) -> subprocess.Popen:
    world = plan.world_size
    environment = {
        **QUIET,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        OWN_RENDEZVOUS: f"file://{folder}/rendezvous",
    }
    train = Path(__file__).resolve().parent.parent / "train.py"
    with open(logs / f"rank_{rank}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, str(train), *overrides],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else log,  # rank 0 speaks for all
            stderr=log,
            start_new_session=True,
        )


def _forward(ranks: list[subprocess.Popen], asked: list[int]):
    """Pass a signal on. A second Ctrl-C or SIGTERM does not wait for the step to end."""

    def handler(number: int, _frame: object) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            asked.append(number)
            if len(asked) == 1:
                print("\nmixtrain: stopping after this step (once more: at once)", file=sys.stderr, flush=True)
        for process in ranks:
            if process.poll() is None:
                _signal_group(process, signal.SIGKILL if len(asked) > 1 else number)

    return handler


def _wait(ranks: list[subprocess.Popen]) -> int | None:
    """Wait for all; the rank whose failure is the cause, or None. After a failure the others get GRACE_SECONDS."""
    deadline = None
    order: list[int] = []  # ranks that failed, in the order seen
    while any(process.poll() is None for process in ranks):
        order += [rank for rank, process in enumerate(ranks) if process.poll() and rank not in order]
        if order and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    order += [rank for rank, process in enumerate(ranks) if process.poll() and rank not in order]
    if not order:
        return None
    # a refused input or a killed process is a cause; a fault soon after it is the others losing their peer
    causes = [rank for rank in order if ranks[rank].returncode == REFUSED or ranks[rank].returncode < 0]
    return (causes or order)[0]


def _kill(ranks: list[subprocess.Popen]) -> None:
    """End every rank's process group: the rank if it is still there, and the helpers it has left behind."""
    for process in ranks:
        _signal_group(process, signal.SIGKILL)
    for process in ranks:
        process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # the whole group has gone already


def _report(plan: Plan, rank: int, code: int, logs: Path) -> int:
    """Say which rank failed and why, here and in status.json; the exit code for it."""
    log = logs / f"rank_{rank}.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own_words = max((number for number, line in enumerate(lines) if line.startswith("mixtrain: ")), default=None)
    if code < 0:
        reason = f"rank {rank} was ended by {signal.Signals(-code).name}"
        print(f"mixtrain: {reason}; its log is {log}", file=sys.stderr)
    elif own_words is not None:
        print("\n".join(lines[own_words:]), file=sys.stderr)
        reason = " ".join(lines[own_words:])
    else:
        reason = f"rank {rank} failed: {lines[-1].strip() if lines else 'without a word'}"
        print(f"mixtrain: rank {rank} failed; its log, {log}, ends in:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in lines[-12:]), file=sys.stderr)
    status = read_status(plan.config.run_dir)
    if status and (status["state"] == "running" or rank):  # rank 0 could not say it, or knows only that a peer is gone
        write_status(plan.config.run_dir, **{**status, "state": "failed", "reason": reason})
    return REFUSED if code == REFUSED else FAULT
