"""Read files of torch.save without torch.load: the location of tensors, and small plain objects.

Rule: the zip directory and the pickle in it are parsed as data (pickles.py), with a limit on each.
A tensor's shape and strides must lie within its record of the zip file.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple

import numpy
import torch

from mixtrain.checkpoint import pickles
from mixtrain.checkpoint.metadata import AXES, DTYPES, fits
from mixtrain.checkpoint.pickles import Damaged, Name, PersistentId, PickleRecord, Unwanted

DIRECTORY = 1 << 20  # bytes: limit for the directory of a zip file
MAX_VALUES = 1 << 16  # in a plain object
MAX_DEPTH = 16
REBUILD = "torch._utils"
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NUMPY = ("numpy._core.multiarray", "numpy.core.multiarray")
ALLOWED = {
    REBUILD: {"_rebuild_tensor_v2", "_rebuild_tensor_v3"},
    "torch": {*STORAGES, *DTYPES},
    "torch.storage": {"UntypedStorage"},
    "collections": {"OrderedDict"},
    # for the random streams of Python and numpy, and Megatron-LM's args
    **{module: {"_reconstruct"} for module in NUMPY},
    "numpy": {"ndarray", "dtype"},
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
}


class TensorLocation(NamedTuple):
    """Where a tensor is stored in a file."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]  # elements
    offset: int  # elements: of the first one within the record
    start: int  # bytes: of the record within the file
    length: int  # bytes: of the record


class Archive:
    """A zip file that torch.save wrote, at bytes start..start + length of a file."""

    def __init__(self, file: BinaryIO, start: int = 0, length: int | None = None):
        """Read the zip directory. Damaged if it is invalid, OSError if the file cannot be read."""
        end = file.seek(0, os.SEEK_END)
        self.file = file
        self.start = start
        self.length = end - start if length is None else length
        if not 0 <= start <= start + self.length <= end:
            raise Damaged(f"it ends before byte {start + self.length:,}")
        try:
            with zipfile.ZipFile(_FileWindow(file, start, self.length)) as archive:
                entries = archive.infolist()
        # zipfile raises many types for damaged bytes, and hides the OSError of a disk
        except Exception as error:
            for cause in (error, error.__context__):
                if isinstance(cause, OSError):
                    raise cause from None
            raise Damaged(f"at byte {start:,}: not a PyTorch archive") from error
        self.entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise Damaged("it has two records of one name")
        if "byteorder" in self.entries and self.bytes_of("byteorder", 16) != b"little":
            raise Unwanted("numbers that are not little-endian are not loaded")

    def record(self, name: str) -> tuple[int, int]:
        """Return (byte of the file where a record's data begin, its size in bytes)."""
        entry = self.entries.get(name)
        is_stored = entry is not None and entry.compress_type == zipfile.ZIP_STORED
        if not is_stored or entry.file_size != entry.compress_size:
            raise Damaged(f"it has no plain record {pickles.shown(name)}")
        if not 0 <= entry.header_offset <= self.length - 30:
            raise Damaged(f"its record {pickles.shown(name)} lies beyond it")
        self.file.seek(self.start + entry.header_offset)
        header = self.file.read(30)
        if header[:4] != b"PK\3\4":
            raise Damaged(f"its record {pickles.shown(name)} is not there")
        # the data follow the name and an extra field
        begin = entry.header_offset + 30 + sum(struct.unpack("<26x2H", header))
        if begin + entry.file_size > self.length:
            raise Damaged(f"its record {pickles.shown(name)} ends beyond it")
        return self.start + begin, entry.file_size

    def bytes_of(self, name: str, most: int) -> bytes:
        begin, size = self.record(name)
        if size > most:
            raise Damaged(
                f"its record {pickles.shown(name)} has {size:,} bytes; at most {most:,} are read"
            )
        self.file.seek(begin)
        return self.file.read(size)

    def tree(self) -> Any:
        """Return the parsed pickle of the saved object, as `pickles.read` returns it."""
        return pickles.read(self.bytes_of("data.pkl", pickles.MOST), ALLOWED)

    def locate(self, record: Any) -> TensorLocation:
        """Return where the tensor of a record of the tree is stored."""
        is_tensor = type(record) is PickleRecord and record.of.module == REBUILD
        if not is_tensor or record.state or len(record.args) < 6:
            raise Damaged("there is no tensor where one should be")
        stored, offset, size, stride, *rest = record.args
        # ("storage", class, record name, device, elements)
        storage = stored.id if type(stored) is PersistentId else None
        if type(storage) is not tuple or len(storage) != 5:
            raise Damaged("a tensor has no storage")
        if storage[0] != "storage" or type(storage[2]) is not str:
            raise Damaged("a tensor has no storage")
        has_dtype = record.of.name == "_rebuild_tensor_v3" and len(rest) > 2
        dtype = _dtype(rest[2] if has_dtype else storage[1])
        start, length = self.record(f"data/{storage[2]}")
        location = TensorLocation(
            dtype, _lengths(size), _lengths(stride), _length(offset), start, length
        )
        if len(location.size) != len(location.stride) or not fits(location.size, dtype):
            raise Damaged("a tensor has no possible shape")
        axes = zip(location.size, location.stride, strict=True)
        span = sum((n - 1) * step for n, step in axes) + 1
        if math.prod(location.size) and (location.offset + span) * dtype.itemsize > length:
            raise Damaged("a tensor has more numbers than its storage")
        return location

    def load(self, location: TensorLocation) -> torch.Tensor:
        """Read a tensor into memory."""
        dtype = location.dtype
        if not math.prod(location.size):
            return torch.empty(location.size, dtype=dtype)
        data = torch.empty(location.length - location.length % dtype.itemsize, dtype=torch.uint8)
        self.file.seek(location.start)
        if self.file.readinto(memoryview(data.numpy())) != data.numel():
            raise Damaged(f"it ends before byte {location.start + data.numel():,}")
        return data.view(dtype).as_strided(location.size, location.stride, location.offset)

    def plain(self) -> Any:
        """Return a small object of plain Python, numpy integers and tensors; else Unwanted."""
        return _PlainObjects(self).convert(self.tree(), 0)


class _PlainObjects:
    """Converts a tree to plain objects, with a total limit: a pickle may repeat an object often."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.values_left = MAX_VALUES
        self.bytes_left = archive.length

    def convert(self, value: Any, depth: int) -> Any:
        self.values_left -= 1
        if self.values_left < 0 or depth > MAX_DEPTH:
            raise Damaged("it is not a small object")
        if type(value) in (list, tuple):
            return type(value)(self.convert(item, depth + 1) for item in value)
        if type(value) is dict and all(type(key) in pickles.KEYS for key in value):
            return {key: self.convert(item, depth + 1) for key, item in value.items()}
        if type(value) is PickleRecord:
            return self.make(value)
        if type(value) in (*pickles.KEYS, bytes):
            return value
        wanted = value if type(value) is Name else "more than plain objects"
        raise Unwanted(f"a pickle that wants {wanted} is not loaded")

    def make(self, record: PickleRecord) -> Any:
        if record.of.module == REBUILD:
            location = self.archive.locate(record)
            self.bytes_left -= location.length
            if self.bytes_left < 0:
                raise Damaged("it has more numbers than bytes")
            return self.archive.load(location)
        if record.of == ("_codecs", "encode"):
            return _encoded(record)
        if record.of.module in NUMPY:
            return _array(record)
        raise Unwanted(f"a pickle that wants {record.of} is not loaded")


def _encoded(record: Any) -> bytes:
    """Return bytes, which pickles of protocol 2 store as latin-1 text."""
    if type(record) is bytes:
        return record
    is_encode = type(record) is PickleRecord and record.of == ("_codecs", "encode")
    args = record.args if is_encode else ()
    if len(args) != 2 or type(args[0]) is not str or args[1] != "latin1":
        raise Damaged("there are no bytes where some should be")
    try:
        return args[0].encode("latin1")
    except UnicodeEncodeError:
        raise Damaged("there are no bytes where some should be") from None


def _array(record: PickleRecord) -> numpy.ndarray:
    """Return a uint32 array, the type of numpy's random state.

    The record's state: (version, shape, dtype, column-major, bytes).
    """
    state = record.state
    if type(state) is not tuple or len(state) != 5 or type(state[2]) is not PickleRecord:
        raise Damaged("an array has no state")
    dtype = state[2]
    is_uint32 = dtype.of == ("numpy", "dtype") and dtype.args[:1] == ("u4",)
    if not is_uint32 or (dtype.state or ())[1:2] != ("<",):
        raise Unwanted("a numpy array of a dtype other than uint32 is not loaded")
    data = _encoded(state[4])
    shape = _lengths(state[1])
    if len(shape) != 1 or 4 * shape[0] != len(data):
        raise Damaged("the data of an array do not fit its shape")
    return numpy.frombuffer(data, "<u4").copy()


def _dtype(name: Any) -> torch.dtype:
    if type(name) is Name and name.module == "torch":
        if dtype := STORAGES.get(name.name):
            return dtype
        if name.name in DTYPES:
            return getattr(torch, name.name)
    raise Damaged("a tensor has no dtype")


def _lengths(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > AXES:
        raise Damaged("there is no shape where one should be")
    return tuple(map(_length, value))


def _length(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise Damaged("a length is not an integer from 0")
    return value


class _FileWindow(io.RawIOBase):
    """Bytes start..start + length of a file, as a file; reads at most DIRECTORY bytes in all."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self.file = file
        self.start = start
        self.length = length
        self.at = 0
        self.bytes_left = DIRECTORY

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if at < 0:
            raise ValueError
        self.at = at
        return at

    def read(self, size: int | None = None) -> bytes:
        available = max(0, self.length - self.at)
        size = available if size is None or size < 0 else min(size, available)
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise ValueError
        self.file.seek(self.start + self.at)
        data = self.file.read(size)
        self.at += len(data)
        return data
