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

from mixtrain import host_memory
from mixtrain.config import Accelerator
from mixtrain.environment import FOLDER, LAUNCHER
from mixtrain.errors import FAULT, FINISHED, REFUSED
from mixtrain.plan import Plan
from mixtrain.run_directory import claimed
from mixtrain.status import read_status, write_status
from mixtrain.stop import StopRequest
from mixtrain.watchdog import STANDS_STILL, Beat, beat_file, main_stack, read_beat, stacks_file

TRAIN = (sys.executable, str(Path(__file__).resolve().parents[2] / "train.py"))
GRACE_SECONDS = 20  # what the other ranks get to notice that one has failed, before they are killed
# the same before the first step, where they wait for it to come to the meeting and notice nothing, and after a
# watchdog has spoken, since when the others had their time
SHORT_GRACE_SECONDS = 5
STACK_SECONDS = 1.0  # what a rank that hangs gets to print its stacks
FRAMES = 6  # of each rank's main thread, on the terminal
# in the path of a frame: it waits for other ranks
WAITING = ("torch/distributed", "megatron/core/distributed", "pipeline_parallel/p2p_communication")
QUIET = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # one node: nothing listens beyond it


def start(plan: Plan, command: tuple[str, ...] | None = None) -> int:
    """Run `command`, or train.py, as plan.world_size ranks of this node; their exit code as one."""
    ranks: list[subprocess.Popen] = []
    with (
        StopRequest() as stop,
        tempfile.TemporaryDirectory(prefix="mixtrain-") as folder,
        claimed(plan, "logs"),
    ):
        hand_over(plan, folder)
        try:
            for rank in range(plan.world_size):
                ranks.append(_start_rank(plan, command or TRAIN, rank, folder))
            failed, running = _wait(plan, ranks, stop, folder)
            hung = _hung(ranks, running) if running and not stop.at_once else []
        finally:
            _kill(ranks)
        if not failed and not running:
            return _ended(plan, stop)
        if stop.at_once:
            return _stopped(plan, "stopped at once on request, without a checkpoint")
        codes = {rank: ranks[rank].returncode for rank in failed}
        if stop.signal and -signal.SIGTERM in codes.values():  # it had not come as far as to note the request
            return _stopped(plan, "stopped before the first step")
        beats = {rank: read_beat(beat_file(folder, rank)) for rank in range(plan.world_size)}
        return _report(plan, codes, running, hung, beats, {rank: _stack(plan, rank, folder) for rank in beats})


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
        **(host_memory.SETTINGS if plan.config.trainer.accelerator is Accelerator.cpu else {}),
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


def _wait(plan: Plan, ranks: list[subprocess.Popen], stop: StopRequest, folder: str) -> tuple[list[int], list[int]]:
    """Wait for all: (the ranks that failed, in the order seen; those still running when the wait was given up)."""
    failed: list[int] = []
    asked, deadline = False, float("inf")
    while True:
        codes = [process.poll() for process in ranks]
        new = [rank for rank, code in enumerate(codes) if code and rank not in failed]
        if new and not failed:
            early = not any(read_beat(beat_file(folder, rank)) for rank in range(plan.world_size))
            soon = early or STANDS_STILL in _log(plan, new[0]).read_text(errors="replace")
            deadline = time.monotonic() + (SHORT_GRACE_SECONDS if soon else GRACE_SECONDS)
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


def _hung(ranks: list[subprocess.Popen], running: list[int]) -> list[int]:
    """Have every rank that still runs print its stacks; those that somebody had stopped (SIGSTOP)."""
    stopped = [rank for rank in running if _state(ranks[rank].pid) == "T"]
    for rank in running:
        ranks[rank].send_signal(signal.SIGUSR2)
        ranks[rank].send_signal(signal.SIGCONT)
    time.sleep(STACK_SECONDS)
    return stopped


def _stack(plan: Plan, rank: int, folder: str) -> list[str]:
    """The frames of a rank's main thread: those it was asked for, which go to its log as well, or those in its log."""
    asked = stacks_file(folder, rank)
    if text := asked.read_text(errors="replace") if asked.exists() else "":
        with open(_log(plan, rank), "a") as log:
            log.write(f"\nstacks of rank {rank}, asked for by the launcher:\n{text}")
    return main_stack(text or _log(plan, rank).read_text(errors="replace"))


def _state(process: int) -> str:
    """The letter that Linux gives the state of a process, T for stopped; "" where it cannot be known."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _ended(plan: Plan, stop: StopRequest) -> int:
    """All ranks have ended as they should; if because of a signal, which one."""
    status = read_status(plan.config.run_dir)
    if stop.signal and status["state"] == "stopped":
        name = signal.Signals(stop.signal).name
        write_status(plan.config.run_dir, **{**status, "reason": f"stopped by {name}"})
    return FINISHED


def _stopped(plan: Plan, words: str) -> int:
    """The ranks were ended before rank 0 could say that it stops."""
    status = read_status(plan.config.run_dir)
    if status["state"] == "running":
        print(f"mixtrain: {words}", file=sys.stderr)
        write_status(plan.config.run_dir, **{**status, "state": "stopped", "reason": words})
    return FINISHED


def _report(
    plan: Plan,
    codes: dict[int, int],
    running: list[int],
    stopped: list[int],
    beats: dict[int, Beat | None],
    stacks: dict[int, list[str]],
) -> int:
    """Say which rank failed, in which step and why, here and in status.json; the exit code for it."""
    # a refused input or a killed process is a cause; a fault may be only that of losing a peer
    causes = [rank for rank, code in codes.items() if code == REFUSED or code < 0]
    rank = (causes or list(codes))[0]
    words, reason = last_words(rank, codes[rank], _log(plan, rank), beats[rank])
    status = read_status(plan.config.run_dir)
    if status["state"] == "failed" and rank == 0:
        reason = status["reason"]  # as rank 0 put it
    still = any(STANDS_STILL in last_words(each, code, _log(plan, each), None)[1] for each, code in codes.items())
    if not causes and (running or still):  # it may be these that the others have waited for
        guilty = stopped or running or [_behind(beats, stacks)]
        silent = f"rank{'s' * (len(guilty) > 1)} {', '.join(map(str, guilty))} did not answer{_in(beats[guilty[0]])}"
        if stopped:
            silent += ": stopped by SIGSTOP"
        words, reason = [f"mixtrain: {silent}", *_stacks(plan, beats, stacks), *words[:1]], f"{silent}; {reason}"
    print("\n".join(words), file=sys.stderr)
    write_status(plan.config.run_dir, **{**status, "state": "failed", "reason": reason})
    return REFUSED if codes[rank] == REFUSED else FAULT


def _in(beat: Beat | None) -> str:
    return f" in {beat}" if beat else ""


def _behind(beats: dict[int, Beat | None], stacks: dict[int, list[str]]) -> int:
    """The rank that the others waited for: the one whose main thread is not in a collective, else the one behind."""
    busy = [
        rank
        for rank, frames in stacks.items()
        if frames and not any(path in frame for frame in frames[:8] for path in WAITING)
    ]
    return (busy or sorted(beats, key=lambda rank: beats[rank].step if beats[rank] else -1))[0]


def _stacks(plan: Plan, beats: dict[int, Beat | None], stacks: dict[int, list[str]]) -> list[str]:
    """Where the main thread of each rank was."""
    lines = []
    for rank, frames in stacks.items():
        if frames:
            lines += [f"  rank {rank}{_in(beats[rank])}, innermost first; all threads in {_log(plan, rank)}:"]
            lines += [f"    {frame}" for frame in frames[:FRAMES]]
    return lines


def last_words(rank: int, code: int, log: Path, beat: Beat | None) -> tuple[list[str], str]:
    """(what the terminal is told of a failed rank, the same in one line)."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own_words = max((number for number, line in enumerate(lines) if line.startswith("mixtrain: ")), default=None)
    if code < 0:
        reason = f"rank {rank} was ended by {signal.Signals(-code).name}{_in(beat)}"
        return [f"mixtrain: {reason}; its log is {log}"], reason
    if own_words is not None and STANDS_STILL in lines[own_words]:
        return [lines[own_words]], lines[own_words].removeprefix("mixtrain: ").removesuffix("; its stacks:")
    if own_words is not None:
        return lines[own_words:], " ".join(lines[own_words:]).removeprefix("mixtrain: ")
    reason = f"rank {rank} failed{_in(beat)}: {lines[-1].strip() if lines else 'without a word'}"
    return [f"mixtrain: rank {rank} failed; its log, {log}, ends in:", *[f"  {line}" for line in lines[-12:]]], reason
