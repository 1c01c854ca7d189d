"""Build PyTorch's checkpoint index from the parsed pickle, with every value checked.

Rule: only the records listed here are read. Classes are never looked up by a name from a file. A
list of chunks is used once, even if the pickle repeats it, so the index takes memory linear in
its file's size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mixtrain.checkpoint.pickles import Damaged, Name, PickleRecord, Unwanted, shown

DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool"
).split()
RECORDS = "torch.distributed.checkpoint.metadata"
STORAGE = "torch.distributed.checkpoint.filesystem"
PLANNER = "torch.distributed.checkpoint.planner"
MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
PATHS = ("pathlib", "pathlib._local")  # the latter is Python 3.13's
# The names in normal indexes, including those of save plans, which Megatron-Core leaves there and
# nothing uses.
ALLOWED = {
    "torch": {"Size", *DTYPES},
    "torch.serialization": {"_get_layout"},
    STORAGE: {"_StorageInfo"},
    RECORDS: {
        "Metadata",
        "StorageMeta",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    **{module: {"PosixPath"} for module in PATHS},
    PLANNER: {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    MEGATRON: {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
}
INDEXES = (Name(RECORDS, "Metadata"), Name(MEGATRON, "MCoreMetadata"))
IGNORED = {"planner_data", "storage_meta", "version", "all_local_plans", "mcore_data"}
LIMIT = 1 << 62  # bytes of a tensor or file
AXES = 16


def metadata_of(tree: Any) -> Metadata:
    """Return PyTorch's index from the result of `pickles.read`. Damaged or Unwanted if invalid."""
    if type(tree) is not PickleRecord or tree.of not in INDEXES:
        raise Damaged("it is not an index")
    state = _fields(tree, tree.of, {"state_dict_metadata", "storage_data"}, IGNORED)
    entries = state["state_dict_metadata"]
    storage = state["storage_data"] or {}
    if type(entries) is not dict or type(storage) is not dict:
        raise Damaged("it does not list tensors")
    builder = _IndexBuilder()
    index = Metadata(
        {_text(key): builder.entry(entry) for key, entry in entries.items()},
        storage_data={
            builder.index(at): builder.storage_info(info) for at, info in storage.items()
        },
    )
    _refuse_missing_storage(index)
    return index


def _refuse_missing_storage(index: Metadata) -> None:
    """Raise Damaged unless every chunk of a tensor, and every object, is stored in some file."""
    for key, entry in index.state_dict_metadata.items():
        offsets = [None]
        if isinstance(entry, TensorStorageMetadata):
            offsets = [chunk.offsets for chunk in entry.chunks]
        if any(MetadataIndex(key, offset) not in index.storage_data for offset in offsets):
            raise Damaged(f"it does not say where a chunk of {shown(key)} is stored")


class _IndexBuilder:
    """Builds PyTorch's records from those of a pickle."""

    def __init__(self):
        self.chunk_lists: set[int] = set()  # the ids of lists that a tensor uses

    def entry(self, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if _is(record, RECORDS, "BytesStorageMetadata"):
            return BytesStorageMetadata()
        state = _fields(
            record, Name(RECORDS, "TensorStorageMetadata"), {"properties", "size", "chunks"}
        )
        size = _size(state["size"])
        dtype = _dtype(state["properties"])
        chunks = state["chunks"]
        if not fits(size, dtype):
            raise Damaged("a tensor has more bytes than possible")
        if type(chunks) is not list or id(chunks) in self.chunk_lists:
            raise Damaged("the chunks of a tensor are not a list of its own")
        self.chunk_lists.add(id(chunks))
        return TensorStorageMetadata(
            TensorProperties(dtype), size, [_chunk(chunk, size) for chunk in chunks]
        )

    def index(self, record: Any) -> MetadataIndex:
        state = _fields(record, Name(RECORDS, "MetadataIndex"), {"fqn"}, {"offset", "index"})
        offset = state.get("offset")
        number = state.get("index")
        if number is not None:
            _count(number)
        return MetadataIndex(_text(state["fqn"]), None if offset is None else _size(offset), number)

    def storage_info(self, record: Any) -> _StorageInfo:
        state = _fields(
            record,
            Name(STORAGE, "_StorageInfo"),
            {"relative_path", "offset", "length"},
            {"transform_descriptors"},
        )
        if state.get("transform_descriptors"):
            raise Unwanted("a checkpoint whose files are compressed or encrypted is not loaded")
        return _StorageInfo(
            _file(state["relative_path"]), _count(state["offset"]), _count(state["length"])
        )


def _chunk(record: Any, size: torch.Size) -> ChunkStorageMetadata:
    state = _fields(record, Name(RECORDS, "ChunkStorageMetadata"), {"offsets", "sizes"})
    offsets = _size(state["offsets"])
    sizes = _size(state["sizes"])
    if not len(offsets) == len(sizes) == len(size) or any(
        at + length > most for at, length, most in zip(offsets, sizes, size, strict=True)
    ):
        raise Damaged("a chunk of a tensor lies outside it")
    return ChunkStorageMetadata(offsets, sizes)


def _is(record: Any, module: str, name: str) -> bool:
    return type(record) is PickleRecord and record.of == (module, name)


def _fields(
    record: Any, of: Name, needed: set[str], possible: set[str] = frozenset()
) -> dict[str, Any]:
    """Return the state of a record of this name. Damaged if its keys differ."""
    if not _is(record, *of) or record.args or type(record.state) is not dict:
        raise Damaged(f"there is no {of.name} where one should be")
    if not needed <= record.state.keys() <= needed | possible:
        odd = [key for key in record.state if key not in needed | possible]
        raise Damaged(f"a {of.name} has {f'a key {shown(str(odd[0]))}' if odd else 'too few keys'}")
    return record.state


def _dtype(record: Any) -> torch.dtype:
    """Return the dtype of a TensorProperties.

    Its state: (dtype, layout, requires_grad, memory format, pinned).
    """
    is_properties = _is(record, RECORDS, "TensorProperties") and type(record.state) is tuple
    if not is_properties or len(record.state) != 5:
        raise Damaged("there is no TensorProperties where one should be")
    dtype, layout, *_ = record.state
    if type(dtype) is not Name or dtype.module != "torch" or dtype.name not in DTYPES:
        raise Damaged("a tensor has no dtype")
    if not _is(layout, "torch.serialization", "_get_layout") or layout.args != ("torch.strided",):
        raise Unwanted("a checkpoint with tensors that are not dense is not loaded")
    return getattr(torch, dtype.name)


def _size(record: Any) -> torch.Size:
    is_size = _is(record, "torch", "Size") and len(record.args) == 1
    if not is_size or type(record.args[0]) is not tuple:
        raise Damaged("there is no Size where one should be")
    if len(record.args[0]) > AXES:
        raise Damaged(f"a tensor has {len(record.args[0])} axes")
    return torch.Size([_count(number) for number in record.args[0]])


def fits(size: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether a tensor of this shape is possible, counting an empty axis as 1."""
    count = dtype.itemsize
    for length in size:
        count *= max(length, 1)
        if count > LIMIT:
            return False
    return True


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LIMIT:
        raise Damaged("a size or offset is not an integer from 0")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or not value.isprintable():
        raise Damaged("the name of a tensor is not text, or has control characters")
    return value


def _file(value: Any) -> str:
    """Return a file's name, in older checkpoints a path. Unwanted if it leaves the directory."""
    is_path = any(_is(value, module, "PosixPath") for module in PATHS)
    if is_path and all(type(component) is str for component in value.args):
        value = os.path.join(*value.args) if value.args else "."
    name = _text(value)
    if name in ("", ".", "..") or os.path.basename(name) != name:
        raise Unwanted(f"leads out of its directory, to {shown(name)}")
    return name
