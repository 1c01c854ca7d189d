"""Save checkpoints: ranks plan together, each writes its share, the first commits them atomically.

Rule: every rank takes every decision with all others, so an error on one (a full disk, a dead
writer) raises on all and never blocks. Until the new directory has its final name, no checkpoint
changes.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata

from mixtrain.checkpoint import content, directory, optimizer_state, shard_writer, state
from mixtrain.checkpoint.directory import MARGIN
from mixtrain.checkpoint.index import COMMON, CONFIG, METADATA, write_index
from mixtrain.checkpoint.integrity import describe, write_manifest
from mixtrain.checkpoint.shard_writer import BackgroundWriter, Item, WriteOutcome
from mixtrain.checkpoint.state import RunState
from mixtrain.checkpoint.write_errors import recovery_advice
from mixtrain.config.plan import Plan
from mixtrain.engine.optimizer import Training, parameters_gathered
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import Fault
from mixtrain.system import collectives
from mixtrain.system.status import DISK_FULL


class Pending(NamedTuple):
    """A save in progress."""

    step: int
    path: Path  # under its temporary name
    size: int  # bytes, of all ranks
    metadata: Metadata | None  # on the first rank
    writer: BackgroundWriter | None
    started: float  # time.monotonic(), seconds


class Saver:
    """Saves the checkpoints of a run. Every rank must make the same calls in the same order."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        training: Training,
        say: Callable[[str], None],
        heartbeat=lambda: None,
    ):
        self.plan = plan
        self.ranks = ranks
        self.training = training
        self.say = say
        self.heartbeat = heartbeat
        self.run_dir = Path(plan.config.run_dir)
        self.pending: Pending | None = None
        self.outcome: WriteOutcome | None = None  # of this rank's pending write
        self.checked = False  # the shards of all ranks are known to cover every tensor
        self.pruning: threading.Thread | None = None
        self.prune_messages: list[str] = []

    def after_step(self, run_state: RunState, ending: bool) -> None:
        """Save if a checkpoint is due after this step, and commit a finished asynchronous save."""
        settings = self.plan.config.checkpoint
        interval = settings.save_interval
        if (ending and settings.save_last) or (interval and run_state.step % interval == 0):
            self.save(run_state)
        self.poll()

    def save(self, run_state: RunState) -> None:
        """Write a checkpoint; with async_save only start to. Fault if it cannot be written."""
        self.drain()
        path = directory.saving_path(directory.path_of(self.run_dir, run_state.step))
        run_state = replace(run_state, optimizer_steps=optimizer_state.steps_done(self.training))
        with parameters_gathered(self.plan, self.training):
            self._save(path, run_state)

    def _save(self, path: Path, run_state: RunState) -> None:
        items, metadata = self._plan_shards()
        size = collectives.total(shard_writer.total_bytes(items), self.ranks.device)
        self._run_on_first(lambda: self._prepare(path, size, run_state), size)
        pending = Pending(run_state.step, path, size, metadata, None, time.monotonic())
        if not self.plan.config.checkpoint.async_save:
            outcome = shard_writer.write_shards(path, self.ranks.rank, items, self.heartbeat)
            self._finish(pending, outcome)
            return
        timeout = 60 * self.plan.config.trainer.timeout_minutes
        snapshot = [
            (item, data.cpu() if isinstance(data, torch.Tensor) else data) for item, data in items
        ]
        writer = BackgroundWriter(path, self.ranks.rank, snapshot, timeout)
        self.pending = pending._replace(writer=writer)
        self.outcome = None

    def poll(self) -> None:
        """Commit the pending checkpoint if all ranks have written their shares."""
        if self.pending is None:
            return
        self.outcome = self.outcome or self.pending.writer.poll()
        written = collectives.total(int(self.outcome is not None), self.ranks.device)
        if written == self.ranks.world_size:
            self._finish_pending()

    def drain(self) -> None:
        """Wait for pending deletions and writes; for writes at most trainer.timeout_minutes."""
        if self.pruning:
            self.pruning.join()
            for line in self.prune_messages:
                self.say(line)
            self.prune_messages = []
        if self.pending is not None:
            self.outcome = self.outcome or self.pending.writer.wait(self.heartbeat)
            self._finish_pending()

    def _finish_pending(self) -> None:
        pending = self.pending
        self.pending = None
        self._finish(pending, self.outcome)

    def _plan_shards(self) -> tuple[list[Item], Metadata | None]:
        """Return what this rank writes, and on the first rank the metadata of all ranks.

        Same steps as Megatron-Core's torch_dist strategy.
        """
        shards, _ = save_preprocess(content.sharded(self.plan, self.training), not self.checked)
        self.checked = True
        shards |= content.rng_state_by_stage()
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            shards, keep_only_main_replica=True
        )
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=self.ranks.is_first)
        local_plan = planner.create_local_plan()
        plans = collectives.gather_on_first(local_plan)
        metadata = None
        if self.ranks.is_first:
            _, metadata = planner.create_global_plan(plans)
        local_plan = planner.finish_plan(planner.create_decentralized_global_plan(local_plan))
        return [(item, planner.resolve_data(item)) for item in local_plan.items], metadata

    def _prepare(self, path: Path, size: int, run_state: RunState) -> None:
        """On the first rank: check free space, make the directory, write the unsharded files."""
        directory.remove(path)
        free = shutil.disk_usage(self.run_dir).free
        if free < size + MARGIN:
            message = (
                f"it takes {size:,} bytes and a margin of {MARGIN:,} for its small files,"
                f" {free:,} are free"
            )
            raise OSError(errno.ENOSPC, message, str(path))
        path.mkdir()
        # in memory first: on a full disk torch.save raises something other than OSError
        common = io.BytesIO()
        torch.save(content.common(self.plan, self.training, run_state), common)
        (path / COMMON).write_bytes(common.getvalue())
        (path / state.NAME).write_text(state.to_json(run_state))

    def _finish(self, pending: Pending, outcome: WriteOutcome) -> None:
        self._refuse_errors(outcome.error, outcome.errno, pending.size)
        outcomes = collectives.gather_on_first(outcome)
        self._run_on_first(lambda: self._commit(pending, outcomes), pending.size)
        seconds = time.monotonic() - pending.started
        name = directory.path_of(self.run_dir, pending.step).name
        self.say(f"saved {name}: {pending.size / 2**20:,.1f} MiB in {seconds:.1f} s")

    def _commit(self, pending: Pending, outcomes: list[WriteOutcome]) -> None:
        """On the first rank: write index and manifest, then rename the directory."""
        path = pending.path
        write_index(path, pending.metadata, outcomes)
        small_files = [path / name for name in (COMMON, state.NAME, METADATA, CONFIG)]
        for small_file in small_files:
            with open(small_file) as file:
                os.fsync(file.fileno())
        large_files = {name: file for outcome in outcomes for name, file in outcome.files}
        write_manifest(path, large_files | describe(small_files))
        directory.sync(path)
        directory.commit(path, pending.step)
        # in a thread: deleting several GB takes about a second
        self.pruning = threading.Thread(target=self._prune)
        self.pruning.start()

    def _prune(self) -> None:
        keep = self.plan.config.checkpoint.keep_last
        self.prune_messages = directory.prune(self.run_dir, keep)

    def _run_on_first(self, action: Callable[[], None], size: int) -> None:
        """Run `action` on the first rank; Fault on every rank if it raises an OSError."""
        error = ""
        number = 0
        if self.ranks.is_first:
            try:
                action()
            except OSError as failure:
                error = f"{failure.filename or self.run_dir}: {failure.strerror}"
                number = failure.errno
        self._refuse_errors(error, number, size)

    def _refuse_errors(self, error: str, number: int, size: int) -> None:
        """Raise Fault on every rank if any rank has an error; `number` is its errno."""
        for rank, problem in collectives.failures((error, number) if error else None):
            self._fail(rank, *problem, size)

    def _fail(self, rank: int, text: str, number: int, size: int) -> None:
        def clean_up() -> str:
            # measured before the removal, which frees space
            disk_use = self._disk_use(size) if number in DISK_FULL else ""
            for partial in self.run_dir.glob("iter_*.saving"):
                directory.remove(partial)
            return disk_use

        disk_use = collectives.from_first(clean_up)
        advice = recovery_advice(self.plan, number)
        raise Fault(
            f"the checkpoint could not be written on rank {rank}: {text}{disk_use}; {advice}"
        )

    def _disk_use(self, size: int) -> str:
        """Return how many of `size` bytes were written and how many are free; "" if not begun."""
        try:
            files = [path.stat() for path in self.run_dir.glob("iter_*.saving/*")]
            written = sum(file.st_size for file in files)
            free = shutil.disk_usage(self.run_dir).free
        except OSError:
            return ""
        if not files:
            return ""
        return f"; of its {size:,} bytes {written:,} were written, {free:,} are free"
