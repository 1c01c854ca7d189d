"""Checkpoints, for tests: every tensor in one, read without a process group and without the code
that is tested.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Key -> whole tensor of all that a checkpoint of the tests' own has."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    wholes = {
        key: torch.full(kind.size, float("nan"), dtype=kind.properties.dtype)
        for key, kind in metadata.state_dict_metadata.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    dcp_load(wholes, storage_reader=FileSystemReader(str(checkpoint)), no_dist=True)
    return wholes


def unequal(a: Path, b: Path) -> list[str]:
    """The keys whose tensors are not equal bit for bit in two checkpoints, or are in one alone."""
    here = tensors_of(a)
    there = tensors_of(b)
    return sorted(here.keys() ^ there.keys()) + [
        key for key in here.keys() & there.keys() if differ(here[key], there[key])
    ]


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype != b.dtype
        or a.shape != b.shape
        or not torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )
