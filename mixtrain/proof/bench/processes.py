"""The processes of variants: ranks that take turns, and shell commands. No torch.

Rule: each process has its own process group, and every wait for it has a time limit. A process that
fails ends the benchmark, and its last output is shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

from mixtrain.errors import Fault
from mixtrain.paths import ROOT
from mixtrain.proof.bench.scenario import Scenario
from mixtrain.proof.bench.variants import Variant
from mixtrain.system.host_memory import SETTINGS
from mixtrain.system.rank_identity import Identity

TIMEOUT_SECONDS = 1800  # for one answer, or one command
GRACE_SECONDS = 20


def signal_group(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def end(child: subprocess.Popen) -> None:
    """Wait a little for a child that has been told to end; kill what is left of its group."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    signal_group(child, signal.SIGKILL)
    child.wait()


def run_command(
    name: str, command: str, shared: Path, folder: Path, until: str | None
) -> dict[str, Any]:
    """Run a command; return its seconds, CPU seconds and peak memory, with all child processes.

    {python} is this Python, {shared} a folder that the row's commands share, {folder} an empty one.
    The seconds are those to the end, or to the first line that matches `until`.
    """
    folder.mkdir(parents=True)
    for key, value in {"python": sys.executable, "shared": shared, "folder": folder}.items():
        command = command.replace(f"{{{key}}}", shlex.quote(str(value)))
    log = folder.with_name(f"{folder.name}.log")
    printed = []
    seconds = None
    os.sync()  # so that earlier writes do not slow this command down
    with log.open("w") as errors:
        began = time.perf_counter()
        child = subprocess.Popen(
            command, shell=True, cwd=ROOT, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    timer = threading.Timer(TIMEOUT_SECONDS, signal_group, [child, signal.SIGKILL])
    timer.start()
    try:
        for line in child.stdout:
            printed.append(line)
            if until and seconds is None and re.search(until, line):
                seconds = time.perf_counter() - began
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = seconds if until else time.perf_counter() - began
    finally:
        timer.cancel()
        child.stdout.close()
        if child.returncode is None:
            # SIGTERM first: a training run ends its ranks, which have their own process groups
            signal_group(child, signal.SIGTERM)
            end(child)
    shutil.rmtree(folder)
    if child.returncode:
        raise Fault(f"{name}: exit code {child.returncode} of {command}\n{log.read_text()[-2000:]}")
    if seconds is None:
        raise Fault(f"{name}: no line of its output matches {until}:\n{''.join(printed)[-2000:]}")
    # a child inherits this process's peak
    is_own_peak = usage.ru_maxrss > 1.2 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024 if is_own_peak else None,
    }


@dataclass(frozen=True)
class WarmupResult:
    """What a variant computed in warmup: an LM loss per repeat, and the gradient norm if known."""

    losses: list[float]
    norm: float | None
    held_bytes: int | None  # between steps, of the rank with the most


class VariantProcesses:
    """Context manager of the processes of one variant, one per rank."""

    def __init__(self, variant: Variant, scenario: Scenario, folder: Path):
        self.variant = variant
        self.folder = folder
        self.children: list[subprocess.Popen] = []
        self.pipes: list[connection.Connection] = []
        ranks = variant.ranks
        paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
        settings = {} if "host" in variant.foreign else SETTINGS
        environment = {**settings, **os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
        if scenario.threads:
            threads = str(max(1, scenario.threads // ranks))
            environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        for rank in range(ranks):
            rank_folder = folder / f"rank_{rank}"
            rank_folder.mkdir(parents=True)
            ours, theirs = Pipe()
            self.pipes.append(ours)
            command = [sys.executable, "-m", "mixtrain.proof.bench.worker", str(theirs.fileno())]
            with theirs, (rank_folder / "log").open("w") as log:
                child = subprocess.Popen(
                    [*command, str(rank_folder)], env=environment, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()],
                )  # fmt: skip
            self.children.append(child)
            identity = Identity(rank, ranks, rank, ranks, f"file://{folder}/rendezvous")
            self._send(rank, (variant, identity, scenario.warmup, scenario.repeats))

    def __enter__(self) -> VariantProcesses:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Let the ranks end; after an error, kill them."""
        for pipe, child in zip(self.pipes, self.children, strict=True):
            pipe.close()
            if kind:
                signal_group(child, signal.SIGKILL)
        for child in self.children:
            end(child)

    def wait_until_ready(self) -> WarmupResult:
        """Wait until all ranks have warmed up; each has the losses of its share of the batch."""
        computed, held_bytes = zip(*self._answers(), strict=True)
        losses = [
            sum(result["sum"] for result in results) / sum(result["tokens"] for result in results)
            for results in zip(*computed, strict=True)
            if "sum" in results[0]
        ]
        return WarmupResult(losses, computed[0][-1].get("norm"), max(held_bytes))

    def take_turn(self) -> dict[str, Any]:
        """Run a turn on all ranks; return maximum time, total CPU time and maximum peak memory."""
        for rank in range(len(self.pipes)):
            self._send(rank, "turn")
        answers = self._answers()
        keys = ("seconds", "amount", "peak_bytes")
        maxima = {key: max(answer[key] for answer in answers) for key in keys}
        return maxima | {"cpu_seconds": sum(answer["cpu_seconds"] for answer in answers)}

    def _send(self, rank: int, message: object) -> None:
        with contextlib.suppress(OSError):  # the rank has ended: _answers reports it
            self.pipes[rank].send(message)

    def _answers(self) -> list[Any]:
        """Return one answer per rank. The first rank that ends instead is reported as the cause."""
        answers: dict[connection.Connection, Any] = {}
        name = self.variant.name
        while waiting := [pipe for pipe in self.pipes if pipe not in answers]:
            ready = connection.wait(waiting, TIMEOUT_SECONDS)
            if not ready:
                raise Fault(
                    f"{name}: rank {self.pipes.index(waiting[0])} has not answered for"
                    f" {TIMEOUT_SECONDS // 60} minutes"
                )
            for pipe in ready:
                try:
                    answers[pipe] = pipe.recv()
                except (EOFError, OSError):
                    rank = self.pipes.index(pipe)
                    code = self.children[rank].wait()
                    output = (self.folder / f"rank_{rank}" / "log").read_text().strip()[-2000:]
                    raise Fault(
                        f"{name}: rank {rank} ended with exit code {code}:\n{output}"
                    ) from None
        return [answers[pipe] for pipe in self.pipes]
