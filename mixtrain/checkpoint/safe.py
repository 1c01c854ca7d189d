"""Reading checkpoints that somebody else may have written: nothing in them is run.

PyTorch opens .metadata with a bare pickle.load and the objects in the shards with weights_only=False; either runs what
a file wants. Rule: every pickle of a checkpoint goes through here, and may name nothing but what stands in a list.
"""

from __future__ import annotations

import os
import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from mixtrain.errors import UserError

METADATA, COMMON = ".metadata", "common.pt"
# What the .metadata of a torch_dist checkpoint is made of: plain records, and functions that look up a name.
DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool".split()
ALLOWED = {
    "torch": {"Size", *DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "StorageMeta", "MetadataIndex", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    # the plans of the ranks, which Megatron-Core leaves there to compare the next save with
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}  # fmt: skip
# What PyTorch's restricted reader may name beside tensors and plain Python: Megatron-LM's args, numpy's random state.
OBJECTS = [
    Namespace,
    numpy.ndarray,
    numpy.dtype,
    numpy.dtypes.UInt32DType,
    numpy._core.multiarray._reconstruct,
]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise UserError(f"{self.path}: a pickle that wants {module}.{name} is not loaded")
        return super().find_class(module, name)


def read_metadata(directory: Path) -> Metadata:
    """The index of a checkpoint: which tensors there are, and in which file each part lies. UserError if it is none."""
    path = Path(directory) / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file, path).load()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle ends in any of them
        raise UserError(f"{path} is damaged: it is not the index of a checkpoint ({type(error).__name__})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise UserError(f"{path} is not the index of a checkpoint")
    for place in (metadata.storage_data or {}).values():
        if not isinstance(place, _StorageInfo) or not all(_is_size(size) for size in (place.offset, place.length)):
            raise UserError(f"{path} is damaged: it does not say where a tensor lies")
        name = str(place.relative_path)
        if name in ("", ".", "..") or os.path.basename(name) != name:
            raise UserError(f"{path} leads out of its directory, to {name}")
    return metadata


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def read_common(directory: Path) -> dict[str, Any]:
    """common.pt: what all ranks share. UserError if it is missing, damaged or wants more than it may."""
    path = Path(directory) / COMMON
    try:
        with open(path, "rb") as file:
            common = load_object(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {refusal(error)}") from None
    except Exception as error:
        raise UserError(f"{path} is damaged: torch.load cannot read it ({type(error).__name__})") from None
    if not isinstance(common, dict):
        raise UserError(f"{path} is not the common state of a checkpoint")
    return common


def load_object(file: Any) -> Any:
    """torch.load, restricted, whatever the environment asks for."""
    torch.serialization.add_safe_globals(OBJECTS)  # for good: Megatron-Core has done so, and a context would undo it
    return torch.load(file, map_location="cpu", weights_only=True)


def refusal(error: pickle.UnpicklingError) -> str:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    return f"a pickle that wants {wanted[1]} is not loaded" if wanted else "it is damaged: torch.load refuses it"
