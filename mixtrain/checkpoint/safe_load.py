"""PyTorch's reader and Megatron-Core's planner of a load, with the restricted readers of safe.py."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from mixtrain.checkpoint.safe import load_object, read_metadata, refusal
from mixtrain.errors import UserError


class Reader(FileSystemReader):
    """PyTorch's reader of checkpoint directories, with an index that is read as above."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(MCoreLoadPlanner):
    """Megatron-Core's plan of a load, with objects that are read as above."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        try:
            self.state_dict[read_item.dest_index.fqn] = load_object(value)
        except pickle.UnpicklingError as error:
            raise UserError(f"the object {read_item.dest_index.fqn}: {refusal(error)}") from None
