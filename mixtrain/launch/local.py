"""Start this node's ranks, forward stop requests, and report how they ended. No torch.

Rule: each rank is its own process group; none outlives the launcher, and once a rank has failed
every wait is bounded.
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
from mixtrain.paths import ROOT
from mixtrain.system import host_memory, scratch, streams
from mixtrain.system.rank_identity import FOLDER, INTERFACES, LAUNCHER, interface_problem
from mixtrain.system.status import try_write_status
from mixtrain.training.run_directory import claim, previous_status
from mixtrain.training.signals import StopRequest
from mixtrain.training.watchdog import (
    STANDS_STILL,
    Heartbeat,
    heartbeat_file,
    main_stack,
    read_heartbeat,
    stacks_file,
)

TRAIN = (sys.executable, str(ROOT / "train.py"))
# how long the other ranks may take to notice that one has failed, before they are killed
GRACE_SECONDS = 20
# the same before the first step, where ranks wait for others to connect and notice nothing, and
# after a watchdog's message, which the others had time to notice
SHORT_GRACE_SECONDS = 5
STACK_SECONDS = 1.0  # how long a rank that hangs may take to print its stacks
FRAMES = 6  # of each rank's main thread, on the terminal
TOP_FRAMES = 8  # where a frame of WAITING means that the rank waits
# in the path of a frame: it waits for other ranks
WAITING = ("torch/distributed", "megatron/core/distributed", "pipeline_parallel/p2p_communication")
# one node: no connection from outside this machine
LOOPBACK = {INTERFACES: "lo"} if sys.platform == "linux" else {}


def start(plan: Plan, command: tuple[str, ...] | None = None) -> int:
    """Run `command` (default: train.py) as plan.world_size ranks here; return the exit code."""
    if wrong := interface_problem(os.environ.get(INTERFACES, LOOPBACK.get(INTERFACES, ""))):
        raise UserError(wrong)  # gloo would report it after 40 s, with a traceback
    with StopRequest() as stop, scratch.folder() as folder, claim(plan, "logs"):
        ranks: list[RankProcess] = []
        try:
            _start_ranks(plan, command or TRAIN, folder, ranks)
            failed, running = _wait(ranks, stop, folder)
            suspended = _dump_stacks(ranks, running) if running and not stop.at_once else []
        finally:
            _kill(ranks)
        try:
            return _report_end(plan, ranks, stop, folder, failed, running, suspended)
        finally:
            for rank in ranks:
                rank.close()


def _report_end(
    plan: Plan,
    ranks: list[RankProcess],
    stop: StopRequest,
    folder: str,
    failed: list[int],
    running: list[int],
    suspended: list[int],
) -> int:
    """Report on the terminal and in status.json how the ranks ended; return the exit code."""
    if not failed and not running:
        return _report_finished(plan, stop)
    if stop.at_once:
        return _report_stopped(plan, "stopped at once on request, without a checkpoint")
    codes = {rank: ranks[rank].poll() for rank in failed}
    # SIGTERM ended a rank that had not yet installed its handler
    if stop.signal and -signal.SIGTERM in codes.values():
        return _report_stopped(plan, "stopped before the first step")
    heartbeats = {
        rank: read_heartbeat(heartbeat_file(folder, rank)) for rank in range(plan.world_size)
    }
    stacks = {rank: _stack(ranks, rank, folder) for rank in heartbeats}
    return _report_failure(plan, ranks, codes, running, suspended, heartbeats, stacks)


def save_plan(plan: Plan, folder: str) -> None:
    """Save the plan for the ranks, which do not compose it again: ${now:...} or conf/ may change.

    A pickle keeps all of it, including the comparison with the recipe. It is safe: `folder` belongs
    to this process alone, mode 0700.
    """
    Path(folder, "plan.pickle").write_bytes(pickle.dumps(plan))


def load_plan() -> Plan:
    """Return, on a rank, the plan of the launcher that started it."""
    return pickle.loads(Path(os.environ[FOLDER], "plan.pickle").read_bytes())


def _start_ranks(
    plan: Plan, command: tuple[str, ...], folder: str, ranks: list[RankProcess]
) -> None:
    """Start all ranks, adding them to `ranks`, which is valid even if a UserError is raised."""
    try:
        save_plan(plan, folder)
        for rank in range(plan.world_size):
            environment = _environment(plan, rank, folder)
            log = _log(plan, rank)
            ranks.append(RankProcess(command, environment, log, on_console=rank == 0))
    except OSError as error:
        reason = f"the ranks could not be started: {error.filename or folder}: {error.strerror}"
        try_write_status(plan.config.run_dir, **_status(plan, state="failed", reason=reason))
        raise UserError(reason) from None


def _environment(plan: Plan, rank: int, folder: str) -> dict[str, str]:
    world = str(plan.world_size)
    return {
        **LOOPBACK,
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
    """Wait for all ranks; return (failed ranks in order, ranks still running after the grace)."""
    failed: list[int] = []
    forwarded = False
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        newly_failed = [rank for rank, code in enumerate(codes) if code and rank not in failed]
        if newly_failed and not failed:
            before_first_step = not any(
                read_heartbeat(heartbeat_file(folder, rank)) for rank in range(len(ranks))
            )
            short = before_first_step or STANDS_STILL in ranks[newly_failed[0]].text()
            deadline = time.monotonic() + (SHORT_GRACE_SECONDS if short else GRACE_SECONDS)
        failed += newly_failed
        running = [rank for rank, code in enumerate(codes) if code is None]
        if not running or stop.at_once or time.monotonic() > deadline:
            return failed, running
        if stop.signal and not forwarded:
            forwarded = True
            _say("\nmixtrain: stopping after this step (once more: at once)")
            for rank in ranks:
                # not to its process group: this step still needs its data workers
                rank.process.send_signal(signal.SIGTERM)
        streams.check_readers()
        time.sleep(0.05)


def _kill(ranks: list[RankProcess]) -> None:
    """Kill every rank and the helper processes it left behind."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.process.wait()


def _dump_stacks(ranks: list[RankProcess], running: list[int]) -> list[int]:
    """Make running ranks print their stacks; return those that were suspended (SIGSTOP)."""
    suspended = [rank for rank in running if _process_state(ranks[rank].process.pid) == "T"]
    for rank in running:
        ranks[rank].process.send_signal(signal.SIGUSR2)
        ranks[rank].process.send_signal(signal.SIGCONT)
    time.sleep(STACK_SECONDS)
    return suspended


def _stack(ranks: list[RankProcess], rank: int, folder: str) -> list[str]:
    """Return the frames of a rank's main thread, from `_dump_stacks` or else from its log.

    Stacks from `_dump_stacks` are also appended to the log.
    """
    stacks = read_text(stacks_file(folder, rank))
    if stacks:
        ranks[rank].append(f"\nstacks of rank {rank}, asked for by the launcher:\n{stacks}")
    return main_stack(stacks or ranks[rank].text())


def _process_state(process: int) -> str:
    """Return Linux' letter for the state of a process, T for suspended; "" if unknown."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _report_finished(plan: Plan, stop: StopRequest) -> int:
    """All ranks ended with exit code 0: if a signal stopped them, write which one."""
    if stop.signal and previous_status(plan.config.run_dir).get("state") == "stopped":
        reason = f"stopped by {signal.Signals(stop.signal).name}"
        # if this fails, status.json still has the state `stopped`
        try_write_status(plan.config.run_dir, **_status(plan, reason=reason))
    return FINISHED


def _report_stopped(plan: Plan, reason: str) -> int:
    """The ranks were ended before rank 0 could write that it stops."""
    if previous_status(plan.config.run_dir).get("state", "running") != "running":
        return FINISHED
    written = _write_end(plan, [f"mixtrain: {reason}"], "stopped", reason)
    return FINISHED if written else FAULT


def _status(plan: Plan, **changes: object) -> dict:
    """Return the contents of status.json with changes; defaults if it cannot be read."""
    default = {
        "state": "running",
        "step": 0,
        "max_steps": plan.config.trainer.max_steps,
        "reason": "",
    }
    return default | previous_status(plan.config.run_dir) | changes


def _write_end(plan: Plan, lines: list[str], state: str, reason: str) -> bool:
    """Print the final lines and update status.json; return whether status.json could be written.

    If not, the last line gives the reason and what to type.
    """
    error = try_write_status(plan.config.run_dir, **_status(plan, state=state, reason=reason))
    if error is not None:
        unwritten = f"status.json cannot be written ({error.strerror}) and does not say so"
        advice = recovery_advice(plan, error.errno)
        reason = reason.removesuffix("; " + advice)
        # a single line would only repeat the reason
        kept = lines if len(lines) > 1 else []
        lines = [*kept, f"mixtrain: {reason}; {unwritten}; {advice}"]
    _say("\n".join(lines))
    return error is None


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone, or the disk is full
        print(message, file=sys.stderr, flush=True)


def _report_failure(
    plan: Plan,
    ranks: list[RankProcess],
    codes: dict[int, int],
    running: list[int],
    suspended: list[int],
    heartbeats: dict[int, Heartbeat | None],
    stacks: dict[int, list[str]],
) -> int:
    """Report which rank failed, in which step and why, here and in status.json; the exit code."""
    remove_leftovers(plan.config.run_dir)  # a partial checkpoint may fill the disk
    messages = {
        rank: failure_message(rank, code, ranks[rank].log, heartbeats[rank], ranks[rank].text())
        for rank, code in codes.items()
    }
    # A refused input or a killed process is a cause. Any other failure may only be the loss of a
    # peer, without a message of its own.
    causes = [rank for rank, code in codes.items() if code == REFUSED or code < 0]
    explained = [rank for rank in codes if not messages[rank][1].startswith(f"rank {rank} failed")]
    rank = (causes or explained or list(codes))[0]
    lines, reason = messages[rank]
    status = previous_status(plan.config.run_dir)
    if status.get("state") == "failed" and rank == 0:
        reason = status["reason"]  # as rank 0 wrote it
    hangs = running or any(STANDS_STILL in text for _, text in messages.values())
    if not causes and hangs:  # the failed ranks may have waited for one of these
        silent = suspended or running or [_slowest(heartbeats, stacks)]
        no_answer = (
            f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} did not"
            f" answer{_in_step(heartbeats[silent[0]])}"
        )
        if suspended:
            no_answer += ": stopped by SIGSTOP"
        lines = [f"mixtrain: {no_answer}", *_stack_lines(plan, heartbeats, stacks), *lines[:1]]
        reason = f"{no_answer}; {reason}"
    _write_end(plan, lines, "failed", reason)
    return REFUSED if codes[rank] == REFUSED else FAULT


def _in_step(heartbeat: Heartbeat | None) -> str:
    return f" in {heartbeat}" if heartbeat else ""


def _slowest(heartbeats: dict[int, Heartbeat | None], stacks: dict[int, list[str]]) -> int:
    """Return the rank that others wait for: one not in a collective, else the furthest behind."""
    busy = [
        rank
        for rank, frames in stacks.items()
        if frames and not any(path in frame for frame in frames[:TOP_FRAMES] for path in WAITING)
    ]
    if busy:
        return busy[0]
    return min(heartbeats, key=lambda rank: heartbeats[rank].step if heartbeats[rank] else -1)


def _stack_lines(
    plan: Plan, heartbeats: dict[int, Heartbeat | None], stacks: dict[int, list[str]]
) -> list[str]:
    """Return lines that show the main thread of each rank."""
    lines = []
    for rank, frames in stacks.items():
        if frames:
            lines += [
                f"  rank {rank}{_in_step(heartbeats[rank])}, innermost first; all threads in"
                f" {_log(plan, rank)}:"
            ]
            lines += [f"    {frame}" for frame in frames[:FRAMES]]
    return lines


def read_text(path: Path) -> str:
    """Return the text of a file, "" if it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def failure_message(
    rank: int, code: int, log: Path, heartbeat: Heartbeat | None, text: str
) -> tuple[list[str], str]:
    """Return (lines for the terminal, one-line reason) of a failed rank with this log text."""
    lines = [line for line in text.splitlines() if line.strip()]
    message_at = max(
        (number for number, line in enumerate(lines) if line.startswith("mixtrain: ")), default=None
    )
    if code < 0:
        reason = f"rank {rank} was ended by {signal.Signals(-code).name}{_in_step(heartbeat)}"
        return [f"mixtrain: {reason}; its log is {log}"], reason
    if message_at is not None:
        message = lines[message_at:]
        if STANDS_STILL in message[0]:  # stacks follow
            message = message[:1]
            reason = message[0].removesuffix("; its stacks:")
        else:
            reason = " ".join(message)
        return message, reason.removeprefix("mixtrain: ")
    last_line = lines[-1].strip() if lines else "without a message"
    return [
        f"mixtrain: rank {rank} failed; its log, {log}, ends in:",
        *[f"  {line}" for line in lines[-12:]],
    ], f"rank {rank} failed{_in_step(heartbeat)}: {last_line}"
