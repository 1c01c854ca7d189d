"""Files of torch.save: each limit of the zip file, of its tensors, and of objects."""

from __future__ import annotations

import io

import pytest
import torch
from archives import message_of, opened, pickled, saved, zipped
from evil_pickles import name, records

from mixtrain.checkpoint import archive
from mixtrain.checkpoint.archive import Archive, _FileWindow
from mixtrain.checkpoint.pickles import Name, PersistentId, PickleRecord

FLOAT = Name("torch", "FloatStorage")
INT = Name("torch", "int32")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
REBUILD_3 = Name("torch._utils", "_rebuild_tensor_v3")


def loaded(archive: Archive) -> torch.Tensor:
    """The tensor that was saved."""
    return archive.load(archive.locate(archive.tree()))


ONE = saved(torch.arange(3.0))
BYTES = len(ONE)


@pytest.mark.parametrize(
    "module, of",
    [
        *[("torch._utils", of) for of in ["_rebuild_tensor_v2", "_rebuild_tensor_v3"]],
        *[("torch", of) for of in ["FloatStorage", "BoolStorage", "float8_e4m3fn", "bool"]],
        *[
            (module, "_reconstruct")
            for module in ["numpy._core.multiarray", "numpy.core.multiarray"]
        ],
        *[("numpy", of) for of in ["ndarray", "dtype"]],
        ("torch.storage", "UntypedStorage"),
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
        ("argparse", "Namespace"),
    ],
    ids="ALLOWED-{}".format,
)
def test_what_honest_files_name_is_allowed(module, of):
    assert pickled(name(module, of)).tree() == (module, of)


@pytest.mark.parametrize(
    "dtype",
    (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
        " float8_e4m3fn float8_e5m2"
    ).split(),
    ids="STORAGES-{}".format,
)
def test_numbers_of_every_dtype_are_read(dtype):
    given = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, dtype))
    read = loaded(opened(saved(given.T)))
    assert (read.dtype, read.tolist()) == (given.dtype, given.T.tolist())


# The zip file


def test_an_archive_is_read_from_the_middle_of_a_file():
    there = Archive(io.BytesIO(b"before" + ONE + b"after"), 6, BYTES)
    assert loaded(there).tolist() == [0, 1, 2]
    rest = Archive(io.BytesIO(b"before" + ONE), 6)
    assert (rest.length, loaded(rest).tolist()) == (BYTES, [0, 1, 2])


@pytest.mark.parametrize(
    "start, length, ends",
    [
        (0, BYTES + 1, BYTES + 1),
        (1, BYTES, BYTES + 1),
        (-1, 5, 4),
        (5, -1, 4),
        (BYTES + 1, 0, BYTES + 1),
    ],
    ids=lambda value: f"__init__-{value}",
)
def test_an_archive_lies_in_its_file(start, length, ends):
    assert (
        message_of(lambda: Archive(io.BytesIO(ONE), start, length))
        == f"Damaged: it ends before byte {ends:,}"
    )


@pytest.mark.parametrize(
    "data", [b"", b"x" * 100, ONE[:-30]], ids=lambda data: f"__init__-{len(data)}"
)
def test_what_is_no_archive_is_damaged(data):
    assert message_of(lambda: opened(data)) == "Damaged: at byte 0: not a PyTorch archive"


def test_a_file_that_cannot_be_read_is_an_error_of_the_system():
    """Whichever read fails; if it is the first, zipfile reports that there is no zip file."""

    class Broken(io.BytesIO):
        def read(self, *size):
            self.left -= 1
            if self.left < 0:
                raise OSError(5, "Input/output error")
            return super().read(*size)

    whole = Broken(ONE)
    whole.left = 100
    assert Archive(whole).entries
    for reads in range(100 - whole.left):
        broken = Broken(ONE)
        broken.left = reads
        with pytest.raises(OSError, match="Input/output error"):
            Archive(broken)


@pytest.mark.parametrize(
    "more, expected",
    [
        ({"b/data.pkl": b""}, "Damaged: it has two records of one name"),
        (
            {"a/byteorder": b"big"},
            "Unwanted: numbers that are not little-endian are not loaded",
        ),
        (
            {"a/byteorder": b"x" * 16},
            "Unwanted: numbers that are not little-endian are not loaded",
        ),
        (
            {"a/byteorder": b"x" * 17},
            "Damaged: its record byteorder has 17 bytes; at most 16 are read",
        ),
    ],
    ids=["__init__-twice", "__init__-big", "__init__-16", "__init__-17"],
)
def test_records_that_no_archive_has_are_refused(more, expected):
    assert message_of(lambda: opened(zipped({"a/data.pkl": b"N."} | more))) == expected


@pytest.mark.parametrize(
    "number, is_read", [(17, True), (18, False)], ids=lambda value: f"DIRECTORY-{value}"
)
def test_a_directory_of_a_mebibyte_is_read(number, is_read):
    data = zipped({"a/data.pkl": b"N."} | {f"a/{at:059998}": b"" for at in range(number)})
    if is_read:
        assert opened(data).tree() is None
    else:
        assert message_of(lambda: opened(data)) == "Damaged: at byte 0: not a PyTorch archive"


def entry_with(there: Archive, **values: int) -> None:
    for key, value in values.items():
        setattr(there.entries["data/0"], key, value)


def ending(there: Archive, past: int) -> None:
    """Shorten the archive to end some bytes after the beginning of the record's header."""
    there.length = there.entries["data/0"].header_offset + past


RECORD = {
    "record-none": (lambda there: there.entries.pop("data/0"), "it has no plain record data/0"),
    "record-compressed": (
        lambda there: entry_with(there, compress_type=8),
        "it has no plain record data/0",
    ),
    "record-two sizes": (
        lambda there: entry_with(there, file_size=11),
        "it has no plain record data/0",
    ),
    "record-before it": (
        lambda there: entry_with(there, header_offset=-1),
        "its record data/0 lies beyond it",
    ),
    "record-no room for a header": (
        lambda there: ending(there, 29),
        "its record data/0 lies beyond it",
    ),
    "record-a header alone": (lambda there: ending(there, 30), "its record data/0 ends beyond it"),
    "record-elsewhere": (
        lambda there: entry_with(there, header_offset=1),
        "its record data/0 is not there",
    ),
    "record-a byte too few": (
        lambda there: setattr(there, "length", sum(there.record("data/0")) - 1),
        "its record data/0 ends beyond it",
    ),
}


@pytest.mark.parametrize("what", RECORD)
def test_a_record_lies_in_its_archive(what):
    there = opened(ONE)
    (change, expected) = RECORD[what]
    change(there)
    assert message_of(lambda: there.record("data/0")) == f"Damaged: {expected}"


def test_a_record_that_ends_with_its_archive_is_read():
    there = opened(ONE)
    there.length = sum(there.record("data/0"))
    assert there.bytes_of("data/0", 12) == torch.arange(3.0).numpy().tobytes()
    assert (
        message_of(lambda: there.bytes_of("data/0", 11))
        == "Damaged: its record data/0 has 12 bytes; at most 11 are read"
    )


def test_a_part_of_a_file_is_a_file_that_ends_where_the_part_does(monkeypatch):
    part = _FileWindow(io.BytesIO(b"0123456789"), 2, 6)
    assert (part.read(2), part.read(0), part.read(), part.read(1)) == (b"23", b"", b"4567", b"")
    assert (part.seek(1), part.read(-1), part.seek(0), part.read(None)) == (
        1,
        b"34567",
        0,
        b"234567",
    )
    assert (part.seek(-2, 2), part.read(9), part.seek(-1, 1), part.read(9)) == (4, b"67", 5, b"7")
    assert (part.seek(9), part.read(1)) == (9, b"")
    with pytest.raises(ValueError):
        part.seek(-1)
    monkeypatch.setattr(archive, "DIRECTORY", 4)
    part = _FileWindow(io.BytesIO(b"0123456789"), 2, 6)
    assert (part.read(3), part.read(1)) == (b"234", b"5")
    with pytest.raises(ValueError):
        part.read(1)


# A tensor


STORAGE = ("storage", FLOAT, "0", "cpu", 3)
UNTYPED = ("storage", None, "0", "cpu", 3)


def tensor(
    place: object = STORAGE, of: Name = REBUILD, size=(3,), stride=(1,), offset=0, more=(False, {})
) -> PickleRecord:
    return PickleRecord(of, (PersistentId(place), offset, size, stride, *more))


def with_state() -> PickleRecord:
    made = tensor()
    made.state = {1: 2}
    return made


NO_TENSOR = "there is no tensor where one should be"
NO_STORAGE = "a tensor has no storage"
NO_SHAPE = "there is no shape where one should be"
NO_LENGTH = "a length is not an integer from 0"
IMPOSSIBLE = "a tensor has no possible shape"
TOO_MANY = "a tensor has more numbers than its storage"
NO_DTYPE = "a tensor has no dtype"
NUMBERS = {
    "locate-text": ("x", NO_TENSOR),
    "locate-another record": (PickleRecord(FLOAT, tensor().args), NO_TENSOR),
    "locate-with a state": (with_state(), NO_TENSOR),
    "locate-five arguments": (PickleRecord(REBUILD, tensor().args[:5]), NO_TENSOR),
    "locate-no storage": (PickleRecord(REBUILD, (STORAGE, *tensor().args[1:])), NO_STORAGE),
    "locate-a list": (tensor([*STORAGE]), NO_STORAGE),
    "locate-four": (tensor(STORAGE[:4]), NO_STORAGE),
    "locate-another word": (tensor(("module", *STORAGE[1:])), NO_STORAGE),
    "locate-a record by number": (tensor(("storage", FLOAT, 0, "cpu", 3)), NO_STORAGE),
    "locate-two strides": (tensor(stride=(1, 1)), IMPOSSIBLE),
    "locate-too large": (tensor(size=(1 << 61, 4), stride=(0, 0)), IMPOSSIBLE),
    "locate-one too many": (tensor(size=(4,)), TOO_MANY),
    "locate-from the second": (tensor(offset=1), TOO_MANY),
    "locate-two far apart": (tensor(size=(2,), stride=(3,)), TOO_MANY),
    "_dtype-text": (tensor(("storage", "float32", "0", "cpu", 3)), NO_DTYPE),
    "_dtype-of another module": (
        tensor(("storage", Name("x", "float32"), "0", "cpu", 3)),
        NO_DTYPE,
    ),
    "_dtype-another name": (tensor(("storage", Name("torch", "Size"), "0", "cpu", 3)), NO_DTYPE),
    "_lengths-a list": (tensor(size=[3]), NO_SHAPE),
    "_lengths-seventeen": (tensor(size=(1,) * 17, stride=(1,) * 17), NO_SHAPE),
    "_length-true": (tensor(size=(True,)), NO_LENGTH),
    "_length-text": (tensor(size=("3",)), NO_LENGTH),
    "_length-below 0": (tensor(offset=-1), NO_LENGTH),
    "_length-2^62": (tensor(size=(0, 1), stride=(1, 1 << 62)), NO_LENGTH),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_what_is_wrong_with_a_tensor_is_said(what):
    record, expected = NUMBERS[what]
    assert message_of(lambda: opened(ONE).locate(record)) == f"Damaged: {expected}"


WHOLE = [0, 1, 2]
TENSORS = {
    "locate-whole": (tensor(), WHOLE),
    "locate-the last two": (tensor(size=(2,), offset=1), [1, 2]),
    "locate-every other": (tensor(size=(2,), stride=(2,)), [0, 2]),
    "locate-a matrix": (tensor(size=(2, 2), stride=(1, 1)), [[0, 1], [1, 2]]),
    "locate-nothing, far away": (tensor(size=(0,), offset=100), []),
    "locate-the second version has no dtype": (tensor(more=(False, {}, INT)), WHOLE),
    "locate-the third without one": (tensor(of=REBUILD_3), WHOLE),
    "locate-the third": (
        tensor(UNTYPED, REBUILD_3, more=(False, {}, Name("torch", "float32"))),
        WHOLE,
    ),
    "_lengths-sixteen": (tensor(size=(0,) + (1,) * 15, stride=(1,) * 16), []),
    "_length-2^62 - 1": (tensor(size=(0, 1), stride=(1, (1 << 62) - 1)), []),
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_is_read_as_its_record_says(what):
    there = opened(ONE)
    (record, expected) = TENSORS[what]
    read = there.load(there.locate(record))
    assert (read.dtype, read.tolist()) == (torch.float32, expected)


def test_bytes_that_are_no_whole_number_are_left():
    parts = records(torch.arange(3.0))
    parts["archive/data/0"] += b"x"
    assert loaded(opened(zipped(parts))).tolist() == WHOLE


def test_a_file_that_became_shorter_is_damaged():
    file = io.BytesIO(ONE)
    there = Archive(file)
    found = there.locate(there.tree())
    file.truncate(found.start + 11)
    assert (
        message_of(lambda: there.load(found))
        == f"Damaged: it ends before byte {found.start + 12:,}"
    )
