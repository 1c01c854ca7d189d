"""The processes of each variant, which take turns: A B C D A B C D. No torch.

Rule: one variant works at a time and all others wait. Every wait for a process has a time limit. A
process that fails ends the benchmark, and its last output is shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtrain.errors import Fault
from mixtrain.proof.bench.machine import ROOT
from mixtrain.proof.bench.scenario import Scenario
from mixtrain.proof.bench.variants import Variant
from mixtrain.proof.bench.worker import WorkerSpec
from mixtrain.system.host_memory import SETTINGS
from mixtrain.system.rank_identity import Identity

TIMEOUT_MINUTES = 30  # for one answer


@dataclass(frozen=True)
class WarmupResult:
    """What a variant computed in warmup: an LM loss per repeat, and the gradient norm if known."""

    losses: list[float]
    norm: float | None
    held_bytes: int | None  # between steps, of the rank with the most


def combine_ranks(answers: list[dict[str, Any]]) -> WarmupResult:
    """Combine the ranks' answers: each has the losses of its share of the batch."""
    repeats = zip(*(answer["computed"] for answer in answers), strict=True)
    losses = [
        sum(result["sum"] for result in results) / sum(result["tokens"] for result in results)
        for results in repeats
        if "sum" in results[0]
    ]
    held_bytes = max(answer["held_bytes"] for answer in answers)
    return WarmupResult(losses, answers[0]["computed"][-1].get("norm"), held_bytes)


class VariantProcesses:
    """The processes of one variant: one per rank."""

    def __init__(self, variant: Variant, scenario: Scenario, folder: Path):
        folder.mkdir(parents=True)
        self.variant = variant
        self.folder = folder
        self.children = []
        threads = scenario.threads and max(1, scenario.threads // variant.ranks)
        for rank in range(variant.ranks):
            identity = Identity(
                rank, variant.ranks, rank, variant.ranks, f"file://{folder}/rendezvous"
            )
            rank_folder = folder / f"rank_{rank}"
            rank_folder.mkdir()
            spec = WorkerSpec(
                variant, identity, scenario.repeats, scenario.warmup, threads, rank_folder
            )
            spec_file = folder / f"spec_{rank}"
            spec_file.write_bytes(pickle.dumps(spec))
            self.children.append(self._start(spec_file, rank_folder, threads))

    def wait_until_ready(self) -> WarmupResult:
        """Wait until all ranks have built their share of the model and warmed up."""
        return combine_ranks(self._answers())

    def _start(self, spec_file: Path, folder: Path, threads: int | None) -> subprocess.Popen:
        paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
        settings = SETTINGS if self.variant.has_memory_settings else {}
        environment = {**settings, **os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
        if threads:
            environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        return subprocess.Popen(
            [sys.executable, "-m", "mixtrain.proof.bench.worker", str(spec_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            env=environment,
            text=True,
            start_new_session=True,
        )

    def take_turn(self) -> dict[str, Any]:
        """Run a turn on all ranks; return maximum time, total CPU time and maximum peak memory."""
        for child in self.children:
            with contextlib.suppress(BrokenPipeError):  # it has ended: _answer reports it
                child.stdin.write("\n")
                child.stdin.flush()
        answers = self._answers()
        keys = ("seconds", "amount", "peak_bytes")
        maxima = {key: max(answer[key] for answer in answers) for key in keys}
        return maxima | {"cpu_seconds": sum(answer["cpu_seconds"] for answer in answers)}

    def _answers(self) -> list[dict[str, Any]]:
        """Return one answer per rank. The first rank that ends instead is reported as the cause."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, child in enumerate(self.children):
                selector.register(child.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self.children):
                ready = selector.select(60 * TIMEOUT_MINUTES)
                if not ready:
                    silent = sorted(set(range(len(self.children))) - set(answers))
                    raise Fault(
                        f"{self.variant.name}: rank {silent[0]} has not answered for"
                        f" {TIMEOUT_MINUTES} minutes"
                    )
                for key, _ in ready:
                    answers[key.data] = self._answer(key.data)
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self.children))]

    def _answer(self, rank: int) -> dict[str, Any]:
        child = self.children[rank]
        if not (line := child.stdout.readline()):
            output = (self.folder / f"rank_{rank}" / "log").read_text().strip()[-2000:]
            raise Fault(
                f"{self.variant.name}: rank {rank} ended with exit code {child.wait()}:\n{output}"
            )
        return json.loads(line)

    def close(self) -> None:
        """Close the workers' standard input, so that they end; kill those that do not."""
        for child in self.children:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()

    def kill(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
