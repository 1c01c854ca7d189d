"""What torch.save has written, read without torch.load: where the numbers of a tensor lie, and small plain objects.

Rule: the zip file's directory and the pickle in it are read as text (pickles.py), with a bound on each. A tensor is
numbers in a record of the file; its shape and strides must lie within it.
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
from mixtrain.checkpoint.pickles import Damaged, Name, Record, Stored, Unwanted

DIRECTORY = 1 << 20  # bytes that the directory of a zip file may have
PARTS = 1 << 16  # of an object
DEEP = 16
REBUILD = "torch._utils"
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
NUMPY = ("numpy._core.multiarray", "numpy.core.multiarray")
ALLOWED = {
    REBUILD: {"_rebuild_tensor_v2", "_rebuild_tensor_v3"},
    "torch": {*STORAGES, *DTYPES},
    "torch.storage": {"UntypedStorage"},
    "collections": {"OrderedDict"},
    # the random streams of Python and numpy; Megatron-LM's args
    **{module: {"_reconstruct"} for module in NUMPY},
    "numpy": {"ndarray", "dtype"},
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
}


class Numbers(NamedTuple):
    """Where a tensor lies."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]  # numbers
    offset: int  # numbers: of its first one within its record
    start: int  # bytes: of its record within the file
    length: int  # bytes of the record


class Archive:
    """A zip file of torch.save's that lies in a file from byte `start` on, and takes `length` bytes there."""

    def __init__(self, file: BinaryIO, start: int = 0, length: int | None = None):
        """Damaged if there is none. OSError if the file cannot be read."""
        end = file.seek(0, os.SEEK_END)
        self.file = file
        self.start = start
        self.length = end - start if length is None else length
        if not 0 <= start <= start + self.length <= end:
            raise Damaged(f"it ends before byte {start + self.length:,}")
        try:
            with zipfile.ZipFile(_Part(file, start, self.length)) as archive:
                entries = archive.infolist()
        # zipfile raises what the bytes lead it to, and hides what the disk said
        except Exception as error:
            for each in (error, error.__context__):
                if isinstance(each, OSError):
                    raise each from None
            raise Damaged(f"at byte {start:,}: no archive of PyTorch's") from error
        self.entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise Damaged("it has two records of one name")
        if "byteorder" in self.entries and self.bytes_of("byteorder", 16) != b"little":
            raise Unwanted("numbers in the byte order of other processors are not loaded")

    def record(self, name: str) -> tuple[int, int]:
        """(byte of the file at which a record's data begin, bytes that it has)."""
        entry = self.entries.get(name)
        if (
            entry is None
            or entry.compress_type != zipfile.ZIP_STORED
            or entry.file_size != entry.compress_size
        ):
            raise Damaged(f"it has no plain record {pickles.shown(name)}")
        if not 0 <= entry.header_offset <= self.length - 30:
            raise Damaged(f"its record {pickles.shown(name)} lies beyond it")
        self.file.seek(self.start + entry.header_offset)
        header = self.file.read(30)
        if header[:4] != b"PK\3\4":
            raise Damaged(f"its record {pickles.shown(name)} is not there")
        # past its name and an extra field
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
        """The text of what was saved, as `pickles.read` has it."""
        return pickles.read(self.bytes_of("data.pkl", pickles.MOST), ALLOWED)

    def numbers(self, record: Any) -> Numbers:
        """Where the tensor lies that a record of the tree stands for."""
        if (
            type(record) is not Record
            or record.of.module != REBUILD
            or record.state
            or len(record.args) < 6
        ):
            raise Damaged("there is no tensor where one should be")
        stored, offset, size, stride, *rest = record.args
        place = stored.id if type(stored) is Stored else None
        if (
            type(place) is not tuple
            or len(place) != 5
            or place[0] != "storage"
            or type(place[2]) is not str
        ):
            raise Damaged("a tensor has no storage")
        dtype = rest[2] if record.of.name == "_rebuild_tensor_v3" and len(rest) > 2 else place[1]
        start, length = self.record(f"data/{place[2]}")
        found = Numbers(
            _dtype(dtype), _lengths(size), _lengths(stride), _length(offset), start, length
        )
        if len(found.size) != len(found.stride) or not fits(found.size, found.dtype):
            raise Damaged("a tensor has no possible shape")
        span = sum((n - 1) * step for n, step in zip(found.size, found.stride, strict=True)) + 1
        if math.prod(found.size) and (found.offset + span) * found.dtype.itemsize > length:
            raise Damaged("a tensor has more numbers than its storage")
        return found

    def tensor(self) -> torch.Tensor:
        """The only thing that was saved, a tensor, in memory of its own."""
        return self.load(self.numbers(self.tree()))

    def load(self, there: Numbers) -> torch.Tensor:
        if not math.prod(there.size):
            return torch.empty(there.size, dtype=there.dtype)
        data = torch.empty(there.length - there.length % there.dtype.itemsize, dtype=torch.uint8)
        self.file.seek(there.start)
        if self.file.readinto(memoryview(data.numpy())) != data.numel():
            raise Damaged(f"it ends before byte {there.start + data.numel():,}")
        return data.view(there.dtype).as_strided(there.size, there.stride, there.offset)

    def plain(self) -> Any:
        """A small object of plain Python, numpy's whole numbers and tensors. Unwanted, if there is more in it."""
        return _Plain(self).of(self.tree(), 0)


class _Plain:
    """Makes plain objects of a tree, with a bound on all together: a pickle can have one part at a million places."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.parts = PARTS
        self.bytes = archive.length

    def of(self, value: Any, depth: int) -> Any:
        self.parts -= 1
        if self.parts < 0 or depth > DEEP:
            raise Damaged("it is no small object")
        if type(value) in (list, tuple):
            return type(value)(self.of(item, depth + 1) for item in value)
        if type(value) is dict and all(type(key) in pickles.KEYS for key in value):
            return {key: self.of(item, depth + 1) for key, item in value.items()}
        if type(value) is Record:
            return self.made(value)
        if type(value) in (*pickles.KEYS, bytes):
            return value
        wanted = value if type(value) is Name else "more than plain objects"
        raise Unwanted(f"a pickle that wants {wanted} is not loaded")

    def made(self, record: Record) -> Any:
        if record.of.module == REBUILD:
            there = self.archive.numbers(record)
            self.bytes -= there.length
            if self.bytes < 0:
                raise Damaged("it has more numbers than bytes")
            return self.archive.load(there)
        if record.of == ("_codecs", "encode"):
            return _encoded(record)
        if record.of.module in NUMPY:
            return _array(record)
        raise Unwanted(f"a pickle that wants {record.of} is not loaded")


def _encoded(record: Any) -> bytes:
    """Bytes, as pickles of protocol 2 have them: text in latin-1."""
    if type(record) is bytes:
        return record
    args = record.args if type(record) is Record and record.of == ("_codecs", "encode") else ()
    if len(args) != 2 or type(args[0]) is not str or args[1] != "latin1":
        raise Damaged("there are no bytes where some should be")
    try:
        return args[0].encode("latin1")
    except UnicodeEncodeError:
        raise Damaged("there are no bytes where some should be") from None


def _array(record: Record) -> numpy.ndarray:
    """numpy's array of uint32, which is what its random state is; state: (version, shape, dtype, by columns, bytes)."""
    state = record.state
    if type(state) is not tuple or len(state) != 5 or type(state[2]) is not Record:
        raise Damaged("an array has no state")
    if (
        state[2].of != ("numpy", "dtype")
        or state[2].args[:1] != ("u4",)
        or (state[2].state or ())[1:2] != ("<",)
    ):
        raise Unwanted("an array of numpy's of other numbers than uint32 is not loaded")
    data = _encoded(state[4])
    shape = _lengths(state[1])
    if len(shape) != 1 or 4 * shape[0] != len(data):
        raise Damaged("an array has not the numbers that it says")
    return numpy.frombuffer(data, "<u4").copy()


def _dtype(name: Any) -> torch.dtype:
    if type(name) is Name and name.module == "torch":
        if found := STORAGES.get(name.name):
            return found
        if name.name in DTYPES:
            return getattr(torch, name.name)
    raise Damaged("a tensor has no dtype")


def _lengths(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > AXES:
        raise Damaged("there is no shape where one should be")
    return tuple(map(_length, value))


def _length(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise Damaged("a length is no whole number from 0 on")
    return value


class _Part(io.RawIOBase):
    """Some bytes of a file as a file, of which no more than DIRECTORY are read."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self.file = file
        self.start = start
        self.length = length
        self.at = 0
        self.left = DIRECTORY

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if at < 0:
            raise ValueError
        self.at = at
        return at

    def read(self, size: int | None = None) -> bytes:
        there = max(0, self.length - self.at)
        size = there if size is None or size < 0 else min(size, there)
        self.left -= size
        if self.left < 0:
            raise ValueError
        self.file.seek(self.start + self.at)
        data = self.file.read(size)
        self.at += len(data)
        return data
