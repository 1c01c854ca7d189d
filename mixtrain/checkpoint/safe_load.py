"""Load tensors through PyTorch's reader interface without unpickling (safe.py)."""

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
    """Reads the index, tensors and objects of a checkpoint directory without unpickling."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = safe.read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        self.expected = {
            MetadataIndex(key, chunk.offsets): (tuple(chunk.sizes), tensor.properties.dtype)
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
            for chunk in tensor.chunks
        }
        return metadata

    def read_data(self, plan: LoadPlan, planner: MCoreLoadPlanner) -> Future[None]:
        def location(item: ReadItem) -> tuple[str, int]:
            stored = self.storage_data[item.storage_index]
            return stored.relative_path, stored.offset

        for item in sorted(plan.items, key=location):
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
            stored_tensor = archive.locate(archive.tree())
            if (stored_tensor.size, stored_tensor.dtype) != self.expected[item.storage_index]:
                raise Damaged(f"a chunk of {key} differs from the index")
            tensor = archive.load(stored_tensor)
        _copy(item, tensor, planner)


def _copy(item: ReadItem, tensor: torch.Tensor, planner: MCoreLoadPlanner) -> None:
    """Copy the requested slice of a stored chunk to its target."""
    slices = tuple(
        slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True)
    )
    target = planner.resolve_tensor(item).detach()
    target.copy_(tensor[slices])
    planner.commit_tensor(item, target)
