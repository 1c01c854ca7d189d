"""The processes of variants and their turns: A B C D A B C D. No torch.

Rule: one variant works at a time and all others wait; every wait for a process is bounded, and a
process that fails ends the benchmark with its last words.
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
from mixtrain.proof.bench.worker import Spec
from mixtrain.system.host_memory import SETTINGS
from mixtrain.system.rank_identity import Identity

MINUTES = 30  # for one answer


@dataclass(frozen=True)
class Computed:
    """What a variant computed while it warmed up: an LM loss a repeat, the gradients' norm where it is known."""

    losses: list[float]
    norm: float | None
    held_bytes: int | None  # between steps, of the fullest rank


def computed(answers: list[dict[str, Any]]) -> Computed:
    """What the ranks say together: each has a part of the batch, and the losses of its tokens."""
    repeats = zip(*(answer["computed"] for answer in answers), strict=True)
    losses = [
        sum(result["sum"] for result in results) / sum(result["tokens"] for result in results)
        for results in repeats
        if "sum" in results[0]
    ]
    held = max(answer["held_bytes"] for answer in answers)
    return Computed(losses, answers[0]["computed"][-1].get("norm"), held)


class Processes:
    """The ranks of one variant."""

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
            spec = folder / f"spec_{rank}"
            own = folder / f"rank_{rank}"
            own.mkdir()
            spec.write_bytes(
                pickle.dumps(
                    Spec(variant, identity, scenario.repeats, scenario.warmup, threads, own)
                )
            )
            self.children.append(self._start(spec, own, threads))

    def ready(self) -> Computed:
        """Wait until all ranks have built their part and warmed up."""
        self.computed = computed(self._answers())
        return self.computed

    def _start(self, spec: Path, own: Path, threads: int | None) -> subprocess.Popen:
        paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
        settings = SETTINGS if self.variant.has_memory_settings else {}
        environment = {**settings, **os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
        if threads:
            environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        return subprocess.Popen(
            [sys.executable, "-m", "mixtrain.proof.bench.worker", str(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(own / "log").open("w"),
            env=environment,
            text=True,
            start_new_session=True,
        )

    def turn(self) -> dict[str, Any]:
        """The turn of all ranks: the slowest one's time, everybody's CPU time, the fullest one's memory."""
        for child in self.children:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its answer says so
                child.stdin.write("\n")
                child.stdin.flush()
        answers = self._answers()
        slowest = {
            key: max(answer[key] for answer in answers)
            for key in ("seconds", "amount", "peak_bytes")
        }
        return slowest | {"cpu_seconds": sum(answer["cpu_seconds"] for answer in answers)}

    def _answers(self) -> list[dict[str, Any]]:
        """One of each rank. The first rank that ends instead is the cause: what others say then follows from it."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, child in enumerate(self.children):
                selector.register(child.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self.children):
                ready = selector.select(60 * MINUTES)
                if not ready:
                    silent = sorted(set(range(len(self.children))) - set(answers))
                    raise Fault(
                        f"{self.variant.name}: rank {silent[0]} has not answered for {MINUTES}"
                        " minutes"
                    )
                for key, _ in ready:
                    answers[key.data] = self._answer(key.data)
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self.children))]

    def _answer(self, rank: int) -> dict[str, Any]:
        child = self.children[rank]
        if not (line := child.stdout.readline()):
            words = (self.folder / f"rank_{rank}" / "log").read_text().strip()[-2000:]
            raise Fault(
                f"{self.variant.name}: rank {rank} ended with exit code {child.wait()}:\n{words}"
            )
        return json.loads(line)

    def close(self) -> None:
        """No more turns: what reads from an empty pipe ends; who does not is ended."""
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

    def end(self) -> None:
        """At once, whatever they do."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
