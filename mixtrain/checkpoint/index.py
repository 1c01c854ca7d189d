"""The small files of a torch_dist checkpoint that index the large ones. No Megatron-Core."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from mixtrain.checkpoint.shard_writer import WriteOutcome

COMMON = "common.pt"
METADATA = ".metadata"
CONFIG = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_index(path: Path, metadata: Metadata, outcomes: list[WriteOutcome]) -> None:
    """Write .metadata (tensors, and where each chunk is stored) and metadata.json (the format)."""
    metadata.storage_data = {
        result.index: result.storage_data for outcome in outcomes for result in outcome.results
    }
    metadata.storage_meta = StorageMeta()
    with open(path / METADATA, "wb") as file:
        pickle.dump(metadata, file)
    (path / CONFIG).write_text(json.dumps(FORMAT))
