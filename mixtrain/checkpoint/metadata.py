"""The index of a checkpoint, from the text of its pickle: PyTorch's own records, made here of values that are checked.

Rule: what is not here is not read. Classes are never looked up by a name in a file; a part of the index is made once,
however often the pickle has it, so that what is made is no larger than what is written.
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

from mixtrain.checkpoint.pickles import Damaged, Name, Record, Unwanted, shown

DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool"
).split()
RECORDS = "torch.distributed.checkpoint.metadata"
STORAGE = "torch.distributed.checkpoint.filesystem"
MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
PATHS = ("pathlib", "pathlib._local")  # the latter is Python 3.13's
# What honest indexes name. Of the last three lines nothing is used: the plans that Megatron-Core
# leaves there.
ALLOWED = {
    "torch": {"Size", *DTYPES},
    "torch.serialization": {"_get_layout"},
    STORAGE: {"_StorageInfo"},
    RECORDS: {
        "Metadata", "StorageMeta", "MetadataIndex", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    **{module: {"PosixPath"} for module in PATHS},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    MEGATRON: {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
}  # fmt: skip
INDEXES = (Name(RECORDS, "Metadata"), Name(MEGATRON, "MCoreMetadata"))
IGNORED = {"planner_data", "storage_meta", "version", "all_local_plans", "mcore_data"}
LIMIT = 1 << 62  # bytes of a tensor or file
AXES = 16


def metadata_of(tree: Any) -> Metadata:
    """PyTorch's index from what `pickles.read` returns. Damaged or Unwanted with what is wrong."""
    if type(tree) is not Record or tree.of not in INDEXES:
        raise Damaged("it is no index")
    found = _fields(tree, tree.of, {"state_dict_metadata", "storage_data"}, IGNORED)
    parts = found["state_dict_metadata"]
    places = found["storage_data"] or {}
    if type(parts) is not dict or type(places) is not dict:
        raise Damaged("it does not list tensors")
    maker = _Maker()
    index = Metadata(
        {_text(key): maker.part(part) for key, part in parts.items()},
        storage_data={maker.index(at): maker.place(place) for at, place in places.items()},
    )
    _refuse_the_homeless(index)
    return index


def _refuse_the_homeless(index: Metadata) -> None:
    """Every part of a tensor, and every object, lies in some file."""
    for key, part in index.state_dict_metadata.items():
        offsets = (
            [chunk.offsets for chunk in part.chunks]
            if isinstance(part, TensorStorageMetadata)
            else [None]
        )
        if any(MetadataIndex(key, offset) not in index.storage_data for offset in offsets):
            raise Damaged(f"it does not say where a part of {shown(key)} lies")


class _Maker:
    """Makes PyTorch's records of those of a pickle, each once."""

    def __init__(self):
        self.lists: set[int] = set()  # those of chunks that are in a tensor

    def part(self, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if _is(record, RECORDS, "BytesStorageMetadata"):
            return BytesStorageMetadata()
        found = _fields(
            record, Name(RECORDS, "TensorStorageMetadata"), {"properties", "size", "chunks"}
        )
        size = _size(found["size"])
        dtype = _dtype(found["properties"])
        chunks = found["chunks"]
        if not fits(size, dtype):
            raise Damaged("a tensor has more bytes than there can be")
        if type(chunks) is not list or id(chunks) in self.lists:
            raise Damaged("the chunks of a tensor are no list of its own")
        self.lists.add(id(chunks))
        return TensorStorageMetadata(
            TensorProperties(dtype), size, [_chunk(chunk, size) for chunk in chunks]
        )

    def index(self, record: Any) -> MetadataIndex:
        found = _fields(record, Name(RECORDS, "MetadataIndex"), {"fqn"}, {"offset", "index"})
        offset = found.get("offset")
        number = found.get("index")
        if number is not None:
            _count(number)
        return MetadataIndex(_text(found["fqn"]), None if offset is None else _size(offset), number)

    def place(self, record: Any) -> _StorageInfo:
        found = _fields(
            record,
            Name(STORAGE, "_StorageInfo"),
            {"relative_path", "offset", "length"},
            {"transform_descriptors"},
        )
        if found.get("transform_descriptors"):
            raise Unwanted("a checkpoint whose files are compressed or encrypted is not loaded")
        return _StorageInfo(
            _file(found["relative_path"]), _count(found["offset"]), _count(found["length"])
        )


def _chunk(record: Any, size: torch.Size) -> ChunkStorageMetadata:
    found = _fields(record, Name(RECORDS, "ChunkStorageMetadata"), {"offsets", "sizes"})
    offsets = _size(found["offsets"])
    sizes = _size(found["sizes"])
    if not len(offsets) == len(sizes) == len(size) or any(
        at + length > most for at, length, most in zip(offsets, sizes, size, strict=True)
    ):
        raise Damaged("a part of a tensor lies beyond it")
    return ChunkStorageMetadata(offsets, sizes)


def _is(record: Any, module: str, name: str) -> bool:
    return type(record) is Record and record.of == (module, name)


def _fields(
    record: Any, of: Name, needed: set[str], possible: set[str] = frozenset()
) -> dict[str, Any]:
    """The state of a record of this name, if it has these keys and no others."""
    if not _is(record, *of) or record.args or type(record.state) is not dict:
        raise Damaged(f"there is no {of.name} where one should be")
    if not needed <= record.state.keys() <= needed | possible:
        odd = [key for key in record.state if key not in needed | possible]
        raise Damaged(f"a {of.name} has {f'a key {shown(str(odd[0]))}' if odd else 'too few keys'}")
    return record.state


def _dtype(record: Any) -> torch.dtype:
    """The dtype of a TensorProperties, whose state is (dtype, layout, requires_grad, memory format, pinned)."""
    if (
        not _is(record, RECORDS, "TensorProperties")
        or type(record.state) is not tuple
        or len(record.state) != 5
    ):
        raise Damaged("there is no TensorProperties where one should be")
    dtype, layout, *_ = record.state
    if type(dtype) is not Name or dtype.module != "torch" or dtype.name not in DTYPES:
        raise Damaged("a tensor has no dtype")
    if not _is(layout, "torch.serialization", "_get_layout") or layout.args != ("torch.strided",):
        raise Unwanted("a checkpoint with tensors that are not dense is not loaded")
    return getattr(torch, dtype.name)


def _size(record: Any) -> torch.Size:
    if (
        not _is(record, "torch", "Size")
        or len(record.args) != 1
        or type(record.args[0]) is not tuple
    ):
        raise Damaged("there is no Size where one should be")
    if len(record.args[0]) > AXES:
        raise Damaged(f"a tensor has {len(record.args[0])} axes")
    return torch.Size([_count(number) for number in record.args[0]])


def fits(size: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether there can be a tensor of this shape, empty or not."""
    count = dtype.itemsize
    for length in size:
        count *= max(length, 1)
        if count > LIMIT:
            return False
    return True


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LIMIT:
        raise Damaged("a size or place is no whole number from 0 on")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or not value.isprintable():
        raise Damaged("the name of a tensor is no text, or has control characters")
    return value


def _file(value: Any) -> str:
    """A file's name, which older checkpoints have as a path. Unwanted, if it lies elsewhere than the index."""
    if any(_is(value, module, "PosixPath") for module in PATHS) and all(
        type(part) is str for part in value.args
    ):
        value = os.path.join(*value.args) if value.args else "."
    name = _text(value)
    if name in ("", ".", "..") or os.path.basename(name) != name:
        raise Unwanted(f"leads out of its directory, to {shown(name)}")
    return name
