"""The small files of a torch_dist checkpoint that say what is in the large ones. No Megatron-Core."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from mixtrain.checkpoint.writing import Written

COMMON = "common.pt"
METADATA = ".metadata"
CONFIG = "metadata.json"


def write_index(path: Path, metadata: Metadata, shares: list[Written]) -> None:
    """Write which tensors there are and where each part lies, and what format this is."""
    metadata.storage_data = {
        result.index: result.storage_data for share in shares for result in share.results
    }
    metadata.storage_meta = StorageMeta()
    with open(path / METADATA, "wb") as file:
        pickle.dump(metadata, file)
    (path / CONFIG).write_text(
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                # fmt: skip
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )
