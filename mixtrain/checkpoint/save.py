"""Saving: the ranks plan together, each writes its share, and what all have written becomes a checkpoint in one step.

Rule: every rank takes every decision with all others, so that a fault on one (a full disk, a dead writer) is an error
on all and never a wait; and until the directory has its name, nothing there has changed.
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
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata

from mixtrain.checkpoint import content, directory, optimizer_state, state, writing
from mixtrain.checkpoint.directory import MARGIN
from mixtrain.checkpoint.index import COMMON, CONFIG, METADATA, write_index
from mixtrain.checkpoint.integrity import describe, write_manifest
from mixtrain.checkpoint.outlook import outlook
from mixtrain.checkpoint.state import RunState
from mixtrain.checkpoint.writing import Item, Writer, Written
from mixtrain.config.plan import Plan
from mixtrain.engine.optimizer import Training, parameters_gathered
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import Fault
from mixtrain.system.status import DISK_FULL


class Pending(NamedTuple):
    """A save that is being written."""

    step: int
    path: Path  # under its temporary name
    size: int  # bytes, of all ranks
    metadata: Metadata | None  # on the first rank
    writer: Writer | None
    started: float


class Saver:
    """Saves the checkpoints of a run. Every rank makes the same calls in the same order."""

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
        self.checked = False  # the shards of all ranks have been seen to make whole tensors
        self.pruning: threading.Thread | None = None
        self.pruned: list[str] = []  # what there is to say of it

    def after_step(self, run_state: RunState, ending: bool) -> None:
        """After a step: save where one is due, and conclude what has been written meanwhile."""
        settings = self.plan.config.checkpoint
        interval = settings.save_interval
        if (ending and settings.save_last) or (interval and run_state.step % interval == 0):
            self.save(run_state)
        self.poll()

    def save(self, run_state: RunState) -> None:
        """Write a checkpoint of this moment; with async_save only begin to. A Fault if it cannot be written."""
        self.drain()
        path = directory.saving(directory.path_of(self.run_dir, run_state.step))
        run_state = replace(run_state, optimizer_steps=optimizer_state.steps_done(self.training))
        with parameters_gathered(self.plan, self.training):
            self._save(path, run_state)

    def _save(self, path: Path, run_state: RunState) -> None:
        items, metadata = self._plan_shards()
        size = self._sum(writing.size_of(items))
        self._agree("", lambda: self._prepare(path, size, run_state), size)
        pending = Pending(run_state.step, path, size, metadata, None, time.monotonic())
        if not self.plan.config.checkpoint.async_save:
            self._finish(pending, writing.write(path, self.ranks.rank, items, self.heartbeat))
            return
        timeout = 60 * self.plan.config.trainer.timeout_minutes
        snapshot = [
            (item, data.cpu() if isinstance(data, torch.Tensor) else data) for item, data in items
        ]
        writer = Writer(path, self.ranks.rank, snapshot, timeout)
        self.pending = pending._replace(writer=writer)
        self.written = None

    def poll(self) -> None:
        """After a step: make a checkpoint of what has been written by now on all ranks."""
        if self.pending is None:
            return
        self.written = self.written or self.pending.writer.poll()
        if self._sum(int(self.written is not None)) == self.ranks.world_size:
            self._conclude()

    def drain(self) -> None:
        """Wait for what is being written, at most trainer.timeout_minutes, and for what is being deleted."""
        if self.pruning:
            self.pruning.join()
            for line in self.pruned:
                self.say(line)
            self.pruned = []
        if self.pending is not None:
            self.written = self.written or self.pending.writer.wait(self.heartbeat)
            self._conclude()

    def _conclude(self) -> None:
        pending = self.pending
        self.pending = None
        self._finish(pending, self.written)

    def _plan_shards(self) -> tuple[list[Item], Metadata | None]:
        """What this rank writes, and on the first rank the metadata of all. As Megatron-Core's torch_dist strategy."""
        shards, _ = save_preprocess(content.sharded(self.plan, self.training), not self.checked)
        self.checked = True
        shards |= content.rng_state_by_stage()
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            shards, keep_only_main_replica=True
        )
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=self.ranks.is_first)
        mine = planner.create_local_plan()
        plans = self._gather(mine)
        metadata = None
        if self.ranks.is_first:
            _, metadata = planner.create_global_plan(plans)
        mine = planner.finish_plan(planner.create_decentralized_global_plan(mine))
        return [(item, planner.resolve_data(item)) for item in mine.items], metadata

    def _prepare(self, path: Path, size: int, run_state: RunState) -> None:
        """On the first rank: the directory, if the disk has room, and the files that do not come in shards."""
        directory.remove(path)
        free = shutil.disk_usage(self.run_dir).free
        if free < size + MARGIN:
            words = (
                f"it takes {size:,} bytes and a margin of {MARGIN:,} for its small files,"
                f" {free:,} are free"
            )
            raise OSError(errno.ENOSPC, words, str(path))
        path.mkdir()
        # writing to a full disk itself, torch.save would raise what is no OSError
        common = io.BytesIO()
        torch.save(content.common(self.plan, self.training, run_state), common)
        (path / COMMON).write_bytes(common.getvalue())
        (path / state.NAME).write_text(state.to_json(run_state))

    def _finish(self, pending: Pending, written: Written) -> None:
        self._agree(written.error, lambda: None, pending.size, written.number)
        shares = self._gather(written)
        self._agree("", lambda: self._commit(pending, shares), pending.size)
        seconds = time.monotonic() - pending.started
        name = directory.path_of(self.run_dir, pending.step).name
        self.say(f"saved {name}: {pending.size / 2**20:,.1f} MiB in {seconds:.1f} s")

    def _commit(self, pending: Pending, shares: list[Written]) -> None:
        """On the first rank: what all have written gets its index, its manifest, and its name."""
        path = pending.path
        metadata = pending.metadata
        write_index(path, metadata, shares)
        small = [path / name for name in (COMMON, state.NAME, METADATA, CONFIG)]
        for each in small:
            with open(each) as file:
                os.fsync(file.fileno())
        write_manifest(
            path, {name: file for share in shares for name, file in share.files} | describe(small)
        )
        directory.sync(path)
        directory.commit(path, pending.step)
        self.pruning = threading.Thread(target=self._prune)  # a second for some GB
        self.pruning.start()

    def _prune(self) -> None:
        self.pruned = directory.prune(self.run_dir, self.plan.config.checkpoint.keep_last)

    def _agree(self, error: str, on_first: Callable[[], None], size: int, number: int = 0) -> None:
        """Do `on_first` on the first rank; a Fault on every rank if it, or any rank's own part, went wrong."""
        if self.ranks.is_first and not error:
            try:
                on_first()
            except OSError as failure:
                error = f"{failure.filename or self.run_dir}: {failure.strerror}"
                number = failure.errno
        outcomes: list[Any] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(outcomes, (error, number))
        wrong = [(rank, text, number) for rank, (text, number) in enumerate(outcomes) if text]
        if wrong:
            self._fail(*wrong[0], size)

    def _fail(self, rank: int, text: str, number: int, size: int) -> None:
        said = [""]
        if self.ranks.is_first:
            # before it is removed, which makes room
            said = [self._how_far(size) if number in DISK_FULL else ""]
            for half in self.run_dir.glob("iter_*.saving"):
                directory.remove(half)
        torch.distributed.broadcast_object_list(said, src=0)
        what_now = outlook(self.plan, number)
        raise Fault(
            f"the checkpoint could not be written on rank {rank}: {text}{said[0]}; {what_now}"
        )

    def _how_far(self, size: int) -> str:
        """How much of a checkpoint of `size` bytes there is on the disk, and what is free; "" if none was begun."""
        try:
            halves = [path.stat() for path in self.run_dir.glob("iter_*.saving/*")]
            written = sum(half.st_size for half in halves)
            free = shutil.disk_usage(self.run_dir).free
        except OSError:
            return ""
        return (
            f"; of its {size:,} bytes {written:,} were written, {free:,} are free" if halves else ""
        )

    def _gather(self, mine: Any) -> list[Any]:
        """Every rank's object, on the first rank; an empty list on the others."""
        found = [None] * self.ranks.world_size if self.ranks.is_first else None
        torch.distributed.gather_object(mine, found, dst=0)
        return found or []

    def _sum(self, number: int) -> int:
        total = torch.tensor([number], dtype=torch.int64, device=self.ranks.device)
        torch.distributed.all_reduce(total)
        return int(total.item())
