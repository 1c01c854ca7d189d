"""Malicious pickles: no opcode has an effect, whatever it names, and no small file is a bomb."""

from __future__ import annotations

import copy
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import numpy
import pytest
import torch
from evil_pickles import (
    MARKER,
    OPCODES,
    Watch,
    alone,
    archive_with,
    attributes,
    found,
    index_with,
    name,
    small_index,
    text,
)

from mixtrain.checkpoint import archive, content, metadata, safe
from mixtrain.checkpoint.archive import Archive
from mixtrain.errors import UserError


def read_object(path: Path) -> object:
    with safe.reading(path) as file:
        return Archive(file).plain()


READERS = {
    "metadata": safe.read_metadata,
    "common": safe.read_common,
    "object": lambda checkpoint: read_object(checkpoint / "__9_9.distcp"),
}


# every opcode with every allowed name, and with every name that a library has declared safe

NAMES = sorted(
    {
        (module, of)
        for known in (metadata, archive)
        for module, all_of in known.ALLOWED.items()
        for of in all_of
    }
)
DECLARED = [
    (thing.__module__, thing.__qualname__) for thing in torch.serialization.get_safe_globals()
]
THINGS = [thing for pair in [*NAMES, *DECLARED] if (thing := found(*pair)) is not None]
FILES = {"metadata": (".metadata", index_with), "object": ("__9_9.distcp", archive_with)}
# records, harmless where nothing reads them
INERT = ("REDUCE", "NEWOBJ", "REDUCE, BUILD", "NEWOBJ, BUILD")


@pytest.mark.parametrize("opcode", OPCODES)
@pytest.mark.parametrize("place", FILES)
def test_no_opcode_does_anything_with_any_name(place, opcode, tmp_path):
    file, make = FILES[place]
    (tmp_path / file).write_bytes(make(b"N"))
    READERS[place](tmp_path)  # read once without an attack: zipfile imports its modules
    assert alone(tmp_path / "outcome", lambda: attacked(place, opcode, tmp_path)) == (
        0,
        "nothing was done",
    )


def attacked(place: str, opcode: str, tmp_path: Path) -> str:
    """Try every name in turn, in this process."""
    file, make = FILES[place]
    before = attributes(THINGS)
    for module, of in [*NAMES, *DECLARED]:
        (tmp_path / file).write_bytes(make(OPCODES[opcode](module, of)))
        with Watch() as events:
            try:
                READERS[place](tmp_path)
                refused = False
            except UserError as error:
                refused = len(error.problems) == 1 and error.problems[0].isprintable()
        assert refused or (place == "metadata" and opcode in INERT), (module, of)
        assert [event for event in events if file not in event] == [], (module, of)
    assert attributes(THINGS) == before
    return "nothing was done"


def test_a_class_that_a_pickle_would_change_is_named(tmp_path):
    (tmp_path / ".metadata").write_bytes(index_with(OPCODES["BUILD"]("pathlib", "PosixPath")))
    with pytest.raises(
        UserError, match=r"\.metadata: a pickle that changes pathlib.PosixPath is not loaded"
    ):
        safe.read_metadata(tmp_path)
    assert str(Path("here")) == "here"


def test_a_member_of_an_enumeration_that_a_library_declared_safe_keeps_its_value(tmp_path):
    """PyTorch's restricted unpickler would set its state."""
    from megatron.core.transformer.enums import AttnBackend

    of = name("megatron.core.transformer.enums", "AttnBackend")
    (tmp_path / "common.pt").write_bytes(
        archive_with(of + b"K\x01\x85R}" + text("_value_") + text("changed") + b"sb")
    )
    with pytest.raises(UserError, match="AttnBackend is not loaded"):
        safe.read_common(tmp_path)
    assert AttnBackend(1).value == 1


# Bombs: a few bytes that would take much time or memory

MANY = 50_000
LAUGHS = b"K\x01" + b"".join(b"q%c(" % number + b"h%c" % number * 10 + b"t" for number in range(40))
SIZE = name("torch", "Size")
BOMBS = {
    "tuples without end": b")" + b"\x85" * MANY,
    "lists without end": b"]" * MANY + b"a" * (MANY - 1),
    "a key that is nested without end": b"}(" + b")" + b"\x85" * (MANY // 8) + b"Nu",
    "records without end": b")" + (b"\x85" + name("torch", "Size") + b"h\0\x86") * 10,
    "ten of ten of ten": LAUGHS,
    "a size of ten of ten": SIZE + LAUGHS + b"\x85R",
    "a container in each byte": b"}" * MANY,
    "a mark in each byte": b"(" * MANY + b"t" * MANY,
    "a far place of the memo": b"Nr\xff\xff\xff\xff",
    "text of 2^62 bytes": b"\x8d" + struct.pack("<Q", 1 << 62) + b"x",
    "text of 4 GiB": b"X\xff\xff\xff\xff",
    "bytes of 2^62 bytes": b"\x8e" + struct.pack("<Q", 1 << 62) + b"x",
    "a number of 2 GiB": b"\x8b\xff\xff\xff\x7f1",
    "a number of 255 bytes": b"\x8a\xff" + b"\x7f" * 255,
    "a number of many digits": b"L" + b"9" * MANY + b"L\n",
    "a frame of 2^63 bytes": b"\x95" + struct.pack("<Q", 1 << 63) + b"N",
    "a name without end": b"c" + b"a" * MANY,
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", FILES)
def test_time_and_memory_are_bounded_by_the_bytes_that_are_there(place, bomb, tmp_path):
    file, make = FILES[place]
    (tmp_path / file).write_bytes(make(BOMBS[bomb]))
    size = (tmp_path / file).stat().st_size
    tracemalloc.start()
    started = time.process_time()
    try:
        READERS[place](tmp_path)  # data that nothing uses may be read
    except UserError as error:
        assert len(str(error)) < 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * size + (1 << 20) and time.process_time() - started < 10


def shared_chunks(times: int) -> bytes:
    """Return an index in which many tensors share one list of many chunks."""
    index = small_index(None)
    part = next(iter(index.state_dict_metadata.values()))
    part.chunks *= 500
    index.state_dict_metadata |= {f"tensor.{number}": part for number in range(times)}
    return pickle.dumps(index)


def test_chunks_that_belong_to_many_tensors_are_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(shared_chunks(5000))
    with pytest.raises(UserError, match="not a list of its own"):
        safe.read_metadata(tmp_path)


def test_an_object_that_has_one_tensor_many_times_is_refused(tmp_path):
    tensor = torch.zeros(10_000)
    torch.save([tensor] * 1000, tmp_path / "__9_9.distcp")
    with pytest.raises(UserError, match="more numbers than bytes"):
        READERS["object"](tmp_path)


# Damaged indexes


def changed(change) -> bytes:
    index = small_index(None)
    change(index)
    return pickle.dumps(index)


def first_place(index):
    return next(iter(index.storage_data.values()))


def first_part(index):
    return index.state_dict_metadata["decoder.weight"]


WRONG = {
    "leads out of its directory, to ../../secret": lambda index: vars(first_place(index)).update(
        relative_path="../../secret"
    ),
    "leads out of its directory, to /etc/passwd": lambda index: vars(first_place(index)).update(
        relative_path=Path("/etc/passwd")
    ),
    "leads out of its directory, to ..": lambda index: vars(first_place(index)).update(
        relative_path=".."
    ),
    "is not text, or has control characters": lambda index: index.state_dict_metadata.update(
        {"\x1b[2J": first_part(index)}
    ),
    "not an integer from 0": lambda index: vars(first_place(index)).update(offset=-1),
    "compressed or encrypted": lambda index: vars(first_place(index)).update(
        transform_descriptors=["zstd"]
    ),
    "a _StorageInfo has a key colour": lambda index: vars(first_place(index)).update(colour="red"),
    "a _StorageInfo has too few keys": lambda index: vars(first_place(index)).pop("length"),
    "lies outside it": lambda index: vars(first_part(index)).update(size=torch.Size([7, 3])),
    "more bytes than possible": lambda index: vars(first_part(index)).update(
        size=torch.Size([1 << 62, 1 << 62])
    ),
    "does not say where a chunk of decoder.weight is stored": lambda index: (
        index.storage_data.popitem() and index.storage_data.popitem()
    ),
    "that are not dense": lambda index: vars(first_part(index).properties).update(
        layout=torch.sparse_coo
    ),
    "has no dtype": lambda index: vars(first_part(index).properties).update(dtype="float32"),
    "it does not list tensors": lambda index: vars(index).update(state_dict_metadata=[]),
    "there is no TensorStorageMetadata": lambda index: index.state_dict_metadata.update(x=None),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_with_an_index_is_said(message, tmp_path):
    (tmp_path / ".metadata").write_bytes(changed(WRONG[message]))
    with pytest.raises(UserError) as refusal:
        safe.read_metadata(tmp_path)
    assert message in str(refusal.value) and len(refusal.value.problems) == 1


def test_a_path_in_an_index_is_read_as_text(tmp_path):
    wanted = changed(
        lambda index: vars(first_place(index)).update(relative_path=Path("__0_0.distcp"))
    )
    (tmp_path / ".metadata").write_bytes(wanted)
    assert type(first_place(safe.read_metadata(tmp_path)).relative_path) is str


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_honest_index_is_read_as_pickle_reads_it(protocol, tmp_path):
    index = small_index({"key": ("a", "path")})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index, protocol))
    read = safe.read_metadata(tmp_path)
    assert (read.state_dict_metadata, read.storage_data) == (
        index.state_dict_metadata,
        index.storage_data,
    )


# Files that torch.save writes


@pytest.mark.parametrize("dtype", metadata.DTYPES)
def test_a_tensor_is_read_as_torch_load_reads_it(dtype, tmp_path):
    whole = torch.arange(24).view(4, 6).to(getattr(torch, dtype))
    for number, tensor in enumerate([whole, whole.T, whole[1:3, ::2], whole[0, 0], whole[:0]]):
        torch.save(tensor, tmp_path / f"{number}")
        with safe.reading(tmp_path / f"{number}") as file:
            there = Archive(file)
            read = there.load(there.locate(there.tree()))
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert read.tolist() == tensor.tolist()


def tensor_with(offset: int, size: tuple, stride: tuple) -> bytes:
    """Return a file of eight numbers whose pickle claims a tensor of this shape."""
    numbers = b"".join(b"J" + struct.pack("<i", number) for number in size)
    steps = b"".join(b"J" + struct.pack("<i", number) for number in stride)
    wanted = (
        name("torch._utils", "_rebuild_tensor_v2")
        + b"(("
        + text("storage")
        + name("torch", "FloatStorage")
    )
    wanted += (
        text("0")
        + text("cpu")
        + b"K\x08tQJ"
        + struct.pack("<i", offset)
        + b"("
        + numbers
        + b"t("
        + steps
        + b"t"
    )
    wanted += b"\x89" + name("collections", "OrderedDict") + b")RtR"
    return archive_with(wanted, [torch.zeros(8), MARKER])


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (1, (8,), (1,)),
        (-1, (8,), (1,)),
        (0, (2, 8), (1, 1)),
        (0, (2,), (-1,)),
        (0, (2,), (1 << 30,)),
        (0, (2,), (1, 1)),
        (0, (1 << 30,) * 3, (0,) * 3),
        (0, (1,) * 30, (1,) * 30),
        (0, (0, 1 << 30, 1 << 30, 1 << 30), (1,) * 4),
    ],
)
def test_a_tensor_reaches_no_number_outside_its_record(offset, size, stride, tmp_path):
    (tmp_path / "__9_9.distcp").write_bytes(tensor_with(offset, size, stride))
    with pytest.raises(UserError, match="is damaged: "):
        READERS["object"](tmp_path)


def test_a_tensor_of_the_whole_record_is_read(tmp_path):
    (tmp_path / "__9_9.distcp").write_bytes(tensor_with(1, (7,), (1,)))
    assert READERS["object"](tmp_path)[1].tolist() == [0] * 7


STREAMS = {
    "numpy's place": lambda streams: streams.update(
        np_rng_state=("MT19937", numpy.zeros(624, "u4"), 10**6, 0, 0.0)
    ),
    "numpy's numbers": lambda streams: streams.update(
        np_rng_state=("MT19937", numpy.zeros(9, "u4"), 0, 0, 0.0)
    ),
    "Python's": lambda streams: streams.update(random_rng_state=(3, (1,) * 624 + (10**6,), None)),
    "PyTorch's": lambda streams: streams.update(
        torch_rng_state=torch.zeros(5056, dtype=torch.uint8)
    ),
    "a missing one": lambda streams: streams.pop("np_rng_state"),
    "a tracker's": lambda streams: streams["rng_tracker_states"].update(more=torch.zeros(1)),
}


@pytest.mark.parametrize("which", STREAMS)
def test_random_streams_that_are_none_are_refused_and_none_is_set(which):
    streams = content._streams()
    # Megatron-Core keeps a reference to its argument
    assert content.set_rng_state([copy.deepcopy(streams)]) is None
    before = torch.get_rng_state()
    STREAMS[which](streams | {"torch_rng_state": torch.Generator().get_state()})
    STREAMS[which](streams)
    with pytest.raises(ValueError, match="damaged"):
        content.set_rng_state([streams])
    assert torch.equal(torch.get_rng_state(), before)
