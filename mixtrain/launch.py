"""Start this node's ranks, ask them to stop, and return their verdict. No torch.

Rule: a rank is a process group of its own; none outlives the launcher, and no wait is unbounded once one has failed.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixtrain.environment import FOLDER, LAUNCHER
from mixtrain.errors import FAULT, FINISHED, REFUSED
from mixtrain.plan import Plan
from mixtrain.run_directory import claim
from mixtrain.status import read_status, write_status
from mixtrain.stop import StopRequest

TRAIN = (sys.executable, str(Path(__file__).resolve().parent.parent / "train.py"))
GRACE_SECONDS = 20  # what the other ranks get to notice that one has failed, before they are killed
EARLY_GRACE_SECONDS = 5  # the same before the first step: they wait for it to come to the meeting, and notice nothing
QUIET = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # one node: nothing listens beyond it


def start(plan: Plan, command: tuple[str, ...] = TRAIN) -> int:
    """Run `command` as plan.world_size ranks of this node; their exit code as one."""
    ranks: list[subprocess.Popen] = []
    with StopRequest() as stop, tempfile.TemporaryDirectory(prefix="mixtrain-") as folder:
        claim(plan, "logs")
        hand_over(plan, folder)
        try:
            for rank in range(plan.world_size):
                ranks.append(_start_rank(plan, command, rank, folder))
            failed, running = _wait(plan, ranks, stop)
        finally:
            _kill(ranks)
        if not failed and not running:
            return FINISHED
        if stop.at_once:
            return _stopped(plan, "stopped at once on request, without a checkpoint")
        codes = {rank: ranks[rank].returncode for rank in failed}
        if stop.signal and -signal.SIGTERM in codes.values():  # it had not come as far as to note the request
            return _stopped(plan, "stopped before the first step")
        return _report(plan, codes, running)


def hand_over(plan: Plan, folder: str) -> None:
    """Leave the plan for the ranks. They do not compose: ${now:...} and the files of conf/ may give another by then.

    A pickle holds all of it, the comparison with the recipe too, and safely: `folder` is this process's own, mode 0700.
    """
    Path(folder, "plan.pickle").write_bytes(pickle.dumps(plan))


def handed_plan() -> Plan:
    """On a rank: the plan of the launcher that started it."""
    return pickle.loads(Path(os.environ[FOLDER], "plan.pickle").read_bytes())


def _start_rank(plan: Plan, command: tuple[str, ...], rank: int, folder: str) -> subprocess.Popen:
    world = str(plan.world_size)
    environment = {
        **QUIET,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // plan.world_size)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        FOLDER: folder,
        LAUNCHER: str(os.getpid()),
    }
    with open(_log(plan, rank), "w") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else log,  # rank 0 speaks for all
            stderr=log,
            start_new_session=True,
        )


def _log(plan: Plan, rank: int) -> Path:
    return Path(plan.config.run_dir) / "logs" / f"rank_{rank}.log"


def _wait(plan: Plan, ranks: list[subprocess.Popen], stop: StopRequest) -> tuple[list[int], list[int]]:
    """Wait for all: (the ranks that failed, in the order seen; those still running when the wait was given up)."""
    failed: list[int] = []
    asked, deadline = False, float("inf")
    while True:
        codes = [process.poll() for process in ranks]
        new = [rank for rank, code in enumerate(codes) if code and rank not in failed]
        if new and not failed:
            early = read_status(plan.config.run_dir)["step"] == 0
            deadline = time.monotonic() + (EARLY_GRACE_SECONDS if early else GRACE_SECONDS)
        failed += new
        running = [rank for rank, code in enumerate(codes) if code is None]
        if not running or stop.at_once or time.monotonic() > deadline:
            return failed, running
        if stop.signal and not asked:
            asked = True
            print("\nmixtrain: stopping after this step (once more: at once)", file=sys.stderr, flush=True)
            for process in ranks:
                process.send_signal(signal.SIGTERM)  # to the rank alone: its data workers are needed for this step
        time.sleep(0.05)


def _kill(ranks: list[subprocess.Popen]) -> None:
    """End every rank's process group: the rank if it is still there, and the helpers it has left behind."""
    for process in ranks:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # the whole group has gone already
    for process in ranks:
        process.wait()


def _stopped(plan: Plan, words: str) -> int:
    """The ranks were ended before rank 0 could say that it stops."""
    status = read_status(plan.config.run_dir)
    if status["state"] == "running":
        print(f"mixtrain: {words}", file=sys.stderr)
        write_status(plan.config.run_dir, **{**status, "state": "stopped", "reason": words})
    return FINISHED


def _report(plan: Plan, codes: dict[int, int], running: list[int]) -> int:
    """Say which rank failed and why, here and in status.json; the exit code for it."""
    # a refused input or a killed process is a cause; a fault may be only that of losing a peer
    causes = [rank for rank, code in codes.items() if code == REFUSED or code < 0]
    rank = (causes or list(codes))[0]
    words, reason = _last_words(rank, codes[rank], _log(plan, rank))
    status = read_status(plan.config.run_dir)
    if status["state"] == "failed" and rank == 0:
        reason = status["reason"]  # as rank 0 put it
    if running and not causes:  # it may be these that the others have waited for
        silent = f"rank{'s' * (len(running) > 1)} {', '.join(map(str, running))} did not answer"
        words, reason = [f"mixtrain: {silent}", *words], f"{silent}; {reason}"
    print("\n".join(words), file=sys.stderr)
    write_status(plan.config.run_dir, **{**status, "state": "failed", "reason": reason})
    return REFUSED if codes[rank] == REFUSED else FAULT


def _last_words(rank: int, code: int, log: Path) -> tuple[list[str], str]:
    """(what the terminal is told of a failed rank, the same in one line)."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own_words = max((number for number, line in enumerate(lines) if line.startswith("mixtrain: ")), default=None)
    if code < 0:
        reason = f"rank {rank} was ended by {signal.Signals(-code).name}"
        return [f"mixtrain: {reason}; its log is {log}"], reason
    if own_words is not None:
        return lines[own_words:], " ".join(lines[own_words:])
    reason = f"rank {rank} failed: {lines[-1].strip() if lines else 'without a word'}"
    return [f"mixtrain: rank {rank} failed; its log, {log}, ends in:", *[f"  {line}" for line in lines[-12:]]], reason
