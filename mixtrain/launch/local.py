"""Start this node's ranks, ask them to stop, and return their verdict. No torch.

Rule: a rank is a process group of its own; none outlives the launcher, and no wait is unbounded
once one has failed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import time
from pathlib import Path

from mixtrain.checkpoint.directory import remove_leftovers
from mixtrain.checkpoint.write_errors import recovery_advice
from mixtrain.config.choices import Accelerator
from mixtrain.config.plan import Plan
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError
from mixtrain.launch.rank_process import RankProcess
from mixtrain.system import host_memory, scratch, streams
from mixtrain.system.rank_identity import FOLDER, INTERFACES, LAUNCHER, interface_problem
from mixtrain.system.status import try_write_status
from mixtrain.training.run_directory import claimed, former
from mixtrain.training.signals import StopRequest
from mixtrain.training.watchdog import (
    STANDS_STILL,
    Heartbeat,
    heartbeat_file,
    main_stack,
    read_heartbeat,
    stacks_file,
)

TRAIN = (sys.executable, str(Path(__file__).resolve().parents[2] / "train.py"))
GRACE_SECONDS = 20  # what the other ranks get to notice that one has failed, before they are killed
# the same before the first step, where they wait for it to come to the meeting and notice nothing,
# and after a watchdog has spoken, since when the others had their time
SHORT_GRACE_SECONDS = 5
STACK_SECONDS = 1.0  # what a rank that hangs gets to print its stacks
FRAMES = 6  # of each rank's main thread, on the terminal
# in the path of a frame: it waits for other ranks
WAITING = ("torch/distributed", "megatron/core/distributed", "pipeline_parallel/p2p_communication")
QUIET = {INTERFACES: "lo"} if sys.platform == "linux" else {}  # one node: nothing listens beyond it


def start(plan: Plan, command: tuple[str, ...] | None = None) -> int:
    """Run `command`, or train.py, as plan.world_size ranks of this node; their exit code as one."""
    if wrong := interface_problem(os.environ.get(INTERFACES, QUIET.get(INTERFACES, ""))):
        raise UserError(wrong)  # gloo's own words for it come after 40 s, and are a traceback
    with StopRequest() as stop, scratch.folder() as folder, claimed(plan, "logs"):
        ranks: list[RankProcess] = []
        try:
            _start_ranks(plan, command or TRAIN, folder, ranks)
            failed, running = _wait(ranks, stop, folder)
            hung = _hung(ranks, running) if running and not stop.at_once else []
        finally:
            _kill(ranks)
        try:
            return _verdict(plan, ranks, stop, folder, failed, running, hung)
        finally:
            for rank in ranks:
                rank.close()


def _verdict(
    plan: Plan,
    ranks: list[RankProcess],
    stop: StopRequest,
    folder: str,
    failed: list[int],
    running: list[int],
    hung: list[int],
) -> int:
    if not failed and not running:
        return _ended(plan, stop)
    if stop.at_once:
        return _stopped(plan, "stopped at once on request, without a checkpoint")
    codes = {rank: ranks[rank].poll() for rank in failed}
    # it had not come as far as to note the request
    if stop.signal and -signal.SIGTERM in codes.values():
        return _stopped(plan, "stopped before the first step")
    heartbeats = {
        rank: read_heartbeat(heartbeat_file(folder, rank)) for rank in range(plan.world_size)
    }
    return _report(
        plan,
        ranks,
        codes,
        running,
        hung,
        heartbeats,
        {rank: _stack(ranks, rank, folder) for rank in heartbeats},
    )


def hand_over(plan: Plan, folder: str) -> None:
    """Leave the plan for the ranks. They do not compose: ${now:...} and the files of conf/ may give another by then.

    A pickle holds all of it, the comparison with the recipe too, and safely: `folder` is this process's own, mode 0700.
    """
    Path(folder, "plan.pickle").write_bytes(pickle.dumps(plan))


def handed_plan() -> Plan:
    """On a rank: the plan of the launcher that started it."""
    return pickle.loads(Path(os.environ[FOLDER], "plan.pickle").read_bytes())


def _start_ranks(
    plan: Plan, command: tuple[str, ...], folder: str, ranks: list[RankProcess]
) -> None:
    """Start them all; those that run are in `ranks`, also after a UserError, where one could not be started."""
    try:
        hand_over(plan, folder)
        for rank in range(plan.world_size):
            ranks.append(
                RankProcess(
                    command, _environment(plan, rank, folder), _log(plan, rank), speaks=rank == 0
                )
            )
    except OSError as error:
        reason = f"the ranks could not be started: {error.filename or folder}: {error.strerror}"
        try_write_status(plan.config.run_dir, **_status(plan, state="failed", reason=reason))
        raise UserError(reason) from None


def _environment(plan: Plan, rank: int, folder: str) -> dict[str, str]:
    world = str(plan.world_size)
    return {
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


def _log(plan: Plan, rank: int) -> Path:
    return Path(plan.config.run_dir) / "logs" / f"rank_{rank}.log"


def _wait(ranks: list[RankProcess], stop: StopRequest, folder: str) -> tuple[list[int], list[int]]:
    """Wait for all: (the ranks that failed, in the order seen; those still running when the wait was given up)."""
    failed: list[int] = []
    asked = False
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        new = [rank for rank, code in enumerate(codes) if code and rank not in failed]
        if new and not failed:
            early = not any(
                read_heartbeat(heartbeat_file(folder, rank)) for rank in range(len(ranks))
            )
            soon = early or STANDS_STILL in ranks[new[0]].text()
            deadline = time.monotonic() + (SHORT_GRACE_SECONDS if soon else GRACE_SECONDS)
        failed += new
        running = [rank for rank, code in enumerate(codes) if code is None]
        if not running or stop.at_once or time.monotonic() > deadline:
            return failed, running
        if stop.signal and not asked:
            asked = True
            _say("\nmixtrain: stopping after this step (once more: at once)")
            for rank in ranks:
                # to it alone: its data workers are needed for this step
                rank.process.send_signal(signal.SIGTERM)
        streams.look()
        time.sleep(0.05)


def _kill(ranks: list[RankProcess]) -> None:
    """End every rank and the helpers it has left behind."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.process.wait()


def _hung(ranks: list[RankProcess], running: list[int]) -> list[int]:
    """Have every rank that still runs print its stacks; those that somebody had stopped (SIGSTOP)."""
    stopped = [rank for rank in running if _state(ranks[rank].process.pid) == "T"]
    for rank in running:
        ranks[rank].process.send_signal(signal.SIGUSR2)
        ranks[rank].process.send_signal(signal.SIGCONT)
    time.sleep(STACK_SECONDS)
    return stopped


def _stack(ranks: list[RankProcess], rank: int, folder: str) -> list[str]:
    """The frames of a rank's main thread: those it was asked for, which go to its log as well, or those in its log."""
    asked = read_text(stacks_file(folder, rank))
    if asked:
        ranks[rank].append(f"\nstacks of rank {rank}, asked for by the launcher:\n{asked}")
    return main_stack(asked or ranks[rank].text())


def _state(process: int) -> str:
    """The letter that Linux gives the state of a process, T for stopped; "" where it cannot be known."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _ended(plan: Plan, stop: StopRequest) -> int:
    """All ranks have ended as they should; if because of a signal, which one."""
    if stop.signal and former(plan.config.run_dir).get("state") == "stopped":
        reason = f"stopped by {signal.Signals(stop.signal).name}"
        # else it says stopped all the same
        try_write_status(plan.config.run_dir, **_status(plan, reason=reason))
    return FINISHED


def _stopped(plan: Plan, words: str) -> int:
    """The ranks were ended before rank 0 could say that it stops."""
    if former(plan.config.run_dir).get("state", "running") != "running":
        return FINISHED
    return FINISHED if _conclude(plan, [f"mixtrain: {words}"], "stopped", words) else FAULT


def _status(plan: Plan, **changes: object) -> dict:
    """What status.json says, with changes, whether or not there is one that can be read."""
    known = {
        "state": "running",
        "step": 0,
        "max_steps": plan.config.trainer.max_steps,
        "reason": "",
    }
    return known | former(plan.config.run_dir) | changes


def _conclude(plan: Plan, words: list[str], state: str, reason: str) -> bool:
    """Say the last words, leave them in status.json; whether that could be written: else the last line says all."""
    wrong = try_write_status(plan.config.run_dir, **_status(plan, state=state, reason=reason))
    if wrong is not None:
        unwritten = f"status.json cannot be written ({wrong.strerror}) and does not say so"
        after = recovery_advice(plan, wrong.errno)
        words = [*words[:-1]] if len(words) == 1 else words
        words = [*words, f"mixtrain: {reason.removesuffix('; ' + after)}; {unwritten}; {after}"]
    _say("\n".join(words))
    return wrong is None


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone, a full disk
        print(words, file=sys.stderr, flush=True)


def _report(
    plan: Plan,
    ranks: list[RankProcess],
    codes: dict[int, int],
    running: list[int],
    stopped: list[int],
    heartbeats: dict[int, Heartbeat | None],
    stacks: dict[int, list[str]],
) -> int:
    """Say which rank failed, in which step and why, here and in status.json; the exit code for it."""
    remove_leftovers(plan.config.run_dir)  # half a checkpoint may be what has filled the disk
    said = {
        rank: last_words(rank, code, ranks[rank].log, heartbeats[rank], ranks[rank].text())
        for rank, code in codes.items()
    }
    # a refused input or a killed process is a cause; a fault may be that of losing a peer, without
    # words of its own
    causes = [rank for rank, code in codes.items() if code == REFUSED or code < 0]
    own = [rank for rank in codes if not said[rank][1].startswith(f"rank {rank} failed")]
    rank = (causes or own or list(codes))[0]
    words, reason = said[rank]
    status = former(plan.config.run_dir)
    if status.get("state") == "failed" and rank == 0:
        reason = status["reason"]  # as rank 0 put it
    still = any(STANDS_STILL in text for _, text in said.values())
    if not causes and (running or still):  # it may be these that the others have waited for
        guilty = stopped or running or [_behind(heartbeats, stacks)]
        silent = (
            f"rank{'s' * (len(guilty) > 1)} {', '.join(map(str, guilty))} did not"
            f" answer{_in(heartbeats[guilty[0]])}"
        )
        if stopped:
            silent += ": stopped by SIGSTOP"
        words = [f"mixtrain: {silent}", *_stacks(plan, heartbeats, stacks), *words[:1]]
        reason = f"{silent}; {reason}"
    _conclude(plan, words, "failed", reason)
    return REFUSED if codes[rank] == REFUSED else FAULT


def _in(heartbeat: Heartbeat | None) -> str:
    return f" in {heartbeat}" if heartbeat else ""


def _behind(heartbeats: dict[int, Heartbeat | None], stacks: dict[int, list[str]]) -> int:
    """The rank that the others waited for: the one whose main thread is not in a collective, else the one behind."""
    busy = [
        rank
        for rank, frames in stacks.items()
        if frames and not any(path in frame for frame in frames[:8] for path in WAITING)
    ]
    return (
        busy
        or sorted(heartbeats, key=lambda rank: heartbeats[rank].step if heartbeats[rank] else -1)
    )[0]


def _stacks(
    plan: Plan, heartbeats: dict[int, Heartbeat | None], stacks: dict[int, list[str]]
) -> list[str]:
    """Where the main thread of each rank was."""
    lines = []
    for rank, frames in stacks.items():
        if frames:
            lines += [
                f"  rank {rank}{_in(heartbeats[rank])}, innermost first; all threads in"
                f" {_log(plan, rank)}:"
            ]
            lines += [f"    {frame}" for frame in frames[:FRAMES]]
    return lines


def read_text(path: Path) -> str:
    """A file as far as there is one that can be read."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def last_words(
    rank: int, code: int, log: Path, heartbeat: Heartbeat | None, text: str
) -> tuple[list[str], str]:
    """(what the terminal is told of a failed rank, whose log has this text; the same in one line)."""
    lines = [line for line in text.splitlines() if line.strip()]
    own_words = max(
        (number for number, line in enumerate(lines) if line.startswith("mixtrain: ")), default=None
    )
    if code < 0:
        reason = f"rank {rank} was ended by {signal.Signals(-code).name}{_in(heartbeat)}"
        return [f"mixtrain: {reason}; its log is {log}"], reason
    if own_words is not None and STANDS_STILL in lines[own_words]:
        return [lines[own_words]], lines[own_words].removeprefix("mixtrain: ").removesuffix(
            "; its stacks:"
        )
    if own_words is not None:
        return lines[own_words:], " ".join(lines[own_words:]).removeprefix("mixtrain: ")
    reason = (
        f"rank {rank} failed{_in(heartbeat)}: {lines[-1].strip() if lines else 'without a word'}"
    )
    return [
        f"mixtrain: rank {rank} failed; its log, {log}, ends in:",
        *[f"  {line}" for line in lines[-12:]],
    ], reason
