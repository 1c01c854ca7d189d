"""PyTorch's reader of checkpoint directories and Megatron-Core's planner of a load, with the readers of safe.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.futures import Future

from mixtrain.checkpoint import safe
from mixtrain.checkpoint.archive import Archive
from mixtrain.checkpoint.pickles import Damaged


class Reader(FileSystemReader):
    """Reads index, tensors and objects without unpickling."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = safe.read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        self.expected = {
            MetadataIndex(key, chunk.offsets): (tuple(chunk.sizes), part.properties.dtype)
            for key, part in metadata.state_dict_metadata.items()
            if isinstance(part, TensorStorageMetadata)
            for chunk in part.chunks
        }
        return metadata

    def read_data(self, plan: LoadPlan, planner: MCoreLoadPlanner) -> Future[None]:
        def place(item: ReadItem) -> tuple[str, int]:
            stored = self.storage_data[item.storage_index]
            return stored.relative_path, stored.offset

        for item in sorted(plan.items, key=place):
            self._read(item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: MCoreLoadPlanner) -> None:
        stored = self.storage_data[item.storage_index]
        key = item.dest_index.fqn
        with safe.reading(Path(self.path) / stored.relative_path) as file:
            archive = Archive(file, stored.offset, stored.length)
            if item.type is LoadItemType.BYTE_IO:
                planner.state_dict[key] = archive.plain()
                return
            there = archive.numbers(archive.tree())
            if (there.size, there.dtype) != self.expected[item.storage_index]:
                raise Damaged(f"a part of {key} is not what the index says")
            tensor = archive.load(there)
        _copy(item, tensor, planner)


def _copy(item: ReadItem, tensor: torch.Tensor, planner: MCoreLoadPlanner) -> None:
    """The part of a stored chunk that is asked for, to where it belongs."""
    cut = tuple(slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True))
    target = planner.resolve_tensor(item).detach()
    target.copy_(tensor[cut])
    planner.commit_tensor(item, target)
