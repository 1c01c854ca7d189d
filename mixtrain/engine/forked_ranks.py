"""Run a function on gloo ranks that are forked from this process, with all imports done.

Importing torch and Megatron-Core takes seconds, and re-initializing Megatron's groups in one
process leaks threads. So every layout gets new processes, which inherit the imports.

Rule: importing this module patches Megatron-Core for the CPU in this process and its children; for
tests and tools, never for a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixtrain.config.choices import Accelerator
from mixtrain.engine.compat.prepare import prepare
from mixtrain.system.rank_identity import Identity, die_with

prepare(Accelerator.cpu)


class RankFailure(AssertionError):
    """A rank raised, died or timed out. The message has the logs; `reason` is a log's last line."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def run_ranks(
    world_size: int, function: Callable[[Identity], Any], folder: Path, timeout: float = 120
) -> list[Any]:
    """Return what `function` returns, through JSON, on each of `world_size` forked ranks.

    Raises RankFailure if a rank fails or has not ended after `timeout` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = f"file://{folder}/rendezvous"
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    parent = os.getpid()
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            die_with(parent)
            _rank(Identity(rank, world_size, rank, world_size, rendezvous), function, folder)
        children.append(child)
    failed = _wait(children, timeout)
    results = [folder / f"rank_{rank}.json" for rank in range(world_size)]
    if failed or not all(path.exists() for path in results):
        logs = "\n".join(
            f"--- rank {rank}\n{(folder / f'rank_{rank}.log').read_text()[-3000:]}"
            for rank in range(world_size)
        )
        raise RankFailure(f"ranks {failed} of {world_size} failed\n{logs}", _reason(folder, failed))
    return [json.loads(path.read_text()) for path in results]


def _reason(folder: Path, failed: list[int]) -> str:
    """Return the last line of the first failed rank with a log; killed ranks print nothing."""
    for rank in failed:
        if lines := (folder / f"rank_{rank}.log").read_text().strip().splitlines():
            return f"rank {rank}: {lines[-1]}"
    return f"ranks {failed} ended without output"


def _rank(identity: Identity, function: Callable[[Identity], Any], folder: Path) -> None:
    """Run `function` in a forked rank and exit; never returns."""
    code = 1
    try:
        os.setsid()
        log = os.open(folder / f"rank_{identity.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # pytest has replaced both
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        result = function(identity)
        temporary = folder / f"rank_{identity.rank}.tmp"
        temporary.write_text(json.dumps(result))
        temporary.rename(folder / f"rank_{identity.rank}.json")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: list[int], timeout: float) -> list[int]:
    """Wait for the children and return the failed ranks.

    5 s after the first failure, or at the timeout, the others are killed.
    """
    deadline = time.monotonic() + timeout
    codes = {}
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank]:
                        deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for rank, child in enumerate(children):
                if rank not in codes:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[rank] = -signal.SIGKILL
        time.sleep(0.01)
    # each rank leads its own session: also kill processes that saving a checkpoint started
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    return [rank for rank, code in sorted(codes.items()) if code]
