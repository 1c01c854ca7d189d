"""The index of a checkpoint: what is accepted, and the message for each thing that is wrong."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from evil_pickles import name, small_index
from torch.distributed.checkpoint.metadata import TensorProperties

from mixtrain.checkpoint import metadata, pickles
from mixtrain.checkpoint.pickles import Damaged, Name, PickleRecord, Unwanted

RECORDS = "torch.distributed.checkpoint.metadata"
PLANNER = "torch.distributed.checkpoint.planner"
STORAGE = "torch.distributed.checkpoint.filesystem"
MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
]
INDEX = pickle.dumps(small_index(None))
OBJECT = "rng_state/shard_0_1"
MOST = 1 << 62
LAYOUT = Name("torch.serialization", "_get_layout")


def tree() -> PickleRecord:
    return pickles.read(INDEX, metadata.ALLOWED)


def parts(index: PickleRecord) -> dict:
    return index.state["state_dict_metadata"]


def part(index: PickleRecord) -> dict:
    return parts(index)["decoder.weight"].state


def places(index: PickleRecord) -> dict:
    return index.state["storage_data"]


def place(index: PickleRecord) -> dict:
    """Return the state of the record that locates the object."""
    return places(index)[place_key(index)].state


def place_key(index: PickleRecord) -> PickleRecord:
    return next(key for key in places(index) if key.state["fqn"] == OBJECT)


def size(*numbers: object) -> PickleRecord:
    return PickleRecord(Name("torch", "Size"), (tuple(numbers),))


def properties(*state: object) -> PickleRecord:
    made = PickleRecord(Name(RECORDS, "TensorProperties"), ())
    made.state = state
    return made


def dense(layout: object = "torch.strided", by: Name = LAYOUT) -> PickleRecord:
    return PickleRecord(by, (layout,))


def typed(dtype: object, layout: object = None) -> Callable[[PickleRecord], None]:
    return lambda index: part(index).update(
        properties=properties(dtype, layout or dense(), False, None, False)
    )


def path(*words: object, module: str = "pathlib") -> Callable[[PickleRecord], None]:
    return lambda index: place(index).update(
        relative_path=PickleRecord(Name(module, "PosixPath"), words)
    )


def chunk(index: PickleRecord, **state: object) -> None:
    part(index)["chunks"][0].state.update(state)


# Valid indexes


@pytest.mark.parametrize(
    "module, of",
    [
        *[("torch", of) for of in ["Size", *DTYPES]],
        ("torch.serialization", "_get_layout"),
        (STORAGE, "_StorageInfo"),
        *[
            (RECORDS, of)
            for of in [
                "Metadata",
                "StorageMeta",
                "MetadataIndex",
                "TensorProperties",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            ]
        ],
        *[(PLANNER, of) for of in ["SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"]],
        *[(MEGATRON, of) for of in ["MCoreMetadata", "MCoreSavePlan"]],
        *[(module, "PosixPath") for module in ["pathlib", "pathlib._local"]],
        ("collections", "OrderedDict"),
    ],
    ids="ALLOWED-{}".format,
)
def test_what_honest_indexes_name_is_allowed(module, of):
    assert pickles.read(name(module, of) + b".", metadata.ALLOWED) == (module, of)


@pytest.mark.parametrize("dtype", DTYPES, ids="DTYPES-{}".format)
def test_a_tensor_of_every_dtype_is_in_an_index(dtype):
    index = small_index(None)
    index.state_dict_metadata["decoder.weight"].properties = TensorProperties(getattr(torch, dtype))
    read = metadata.metadata_of(pickles.read(pickle.dumps(index), metadata.ALLOWED))
    assert read.state_dict_metadata["decoder.weight"].properties.dtype is getattr(torch, dtype)


def whole(index: PickleRecord) -> None:
    """Change nothing."""


def of_megatron(index: PickleRecord) -> None:
    index.of = Name(MEGATRON, "MCoreMetadata")
    index.state["mcore_data"] = {}


def without_numbers(index: PickleRecord) -> None:
    """As PyTorch wrote it before it had numbers."""
    for key in places(index):
        key.state.pop("index", None)


def many_axes(index: PickleRecord) -> None:
    part(index).update(size=size(*[1] * 16))
    part(index)["chunks"] = part(index)["chunks"][:1]
    chunk(index, offsets=size(*[0] * 16), sizes=size(*[1] * 16))
    next(key for key in places(index) if key.state["fqn"] == "decoder.weight").state["offset"] = (
        size(*[0] * 16)
    )


READ = {
    "IGNORED-whole": whole,
    "IGNORED-Megatron-Core's": of_megatron,
    "INDEXES-Megatron-Core's": of_megatron,
    "index-without numbers": without_numbers,
    "_fields-no transforms": lambda index: place(index).pop("transform_descriptors", None),
    "_fields-transforms": lambda index: place(index).update(transform_descriptors=None),
    "_size-sixteen axes": many_axes,
    "_count-the largest": lambda index: place(index).update(length=MOST),
    "_file-a path": path("__0_1.distcp"),
    "PATHS-a later Python's path": path("__0_1.distcp", module="pathlib._local"),
}


@pytest.mark.parametrize("what", READ)
def test_an_index_that_is_as_it_may_be_is_read(what):
    index = tree()
    READ[what](index)
    read = metadata.metadata_of(index)
    assert list(read.state_dict_metadata) == ["embedding.weight", "decoder.weight", OBJECT]
    assert [place.relative_path for place in read.storage_data.values()] == ["__0_0.distcp"] * 4 + [
        "__0_1.distcp"
    ]


def test_an_honest_index_has_what_it_was_written_with():
    read = metadata.metadata_of(tree())
    written = small_index(None)
    assert (read.state_dict_metadata, read.storage_data) == (
        written.state_dict_metadata,
        written.storage_data,
    )


def test_an_index_of_nothing_is_read():
    index = tree()
    index.state.update(state_dict_metadata={}, storage_data=None)
    read = metadata.metadata_of(index)
    assert (read.state_dict_metadata, read.storage_data) == ({}, {})


# Invalid indexes

SIZE = PickleRecord(Name("torch", "Size"), ())
NO_NUMBER = "a size or offset is not an integer from 0"
NO_TEXT = "the name of a tensor is not text, or has control characters"
NO_PROPERTIES = "there is no TensorProperties where one should be"
NO_DTYPE = "a tensor has no dtype"
NOT_DENSE = "a checkpoint with tensors that are not dense is not loaded"
NO_SIZE = "there is no Size where one should be"
NO_PLACE = "there is no _StorageInfo where one should be"
BEYOND = "a chunk of a tensor lies outside it"
OUT = "leads out of its directory, to "
F32 = Name("torch", "float32")
WRONG = {
    "metadata_of-no list of tensors": (
        lambda i: i.state.update(state_dict_metadata=[]),
        "it does not list tensors",
    ),
    "metadata_of-no list of places": (
        lambda i: i.state.update(storage_data=[1]),
        "it does not list tensors",
    ),
    "metadata_of-no places": (lambda i: i.state.pop("storage_data"), "a Metadata has too few keys"),
    "metadata_of-another record": (
        lambda i: setattr(i, "of", Name("torch", "Size")),
        "it is not an index",
    ),
    "_refuse_missing_storage-one part": (
        lambda i: places(i).pop(
            next(key for key in places(i) if key.state["fqn"] == "decoder.weight")
        ),
        "it does not say where a chunk of decoder.weight is stored",
    ),
    "_refuse_missing_storage-an object": (
        lambda i: places(i).pop(place_key(i)),
        f"it does not say where a chunk of {OBJECT} is stored",
    ),
    "entry-no record": (
        lambda i: parts(i).update(x=None),
        "there is no TensorStorageMetadata where one should be",
    ),
    "entry-chunks that are no list": (
        lambda i: part(i).update(chunks=()),
        "the chunks of a tensor are not a list of its own",
    ),
    "entry-chunks of another": (
        lambda i: part(i).update(chunks=parts(i)["embedding.weight"].state["chunks"]),
        "the chunks of a tensor are not a list of its own",
    ),
    "entry-too large": (
        lambda i: part(i).update(size=size(MOST, 2)),
        "a tensor has more bytes than possible",
    ),
    "index-a number below 0": (lambda i: place_key(i).state.update(index=-1), NO_NUMBER),
    "storage_info-compressed": (
        lambda i: place(i).update(transform_descriptors=["zstd"]),
        "a checkpoint whose files are compressed or encrypted is not loaded",
    ),
    "_chunk-beyond along one axis": (lambda i: chunk(i, sizes=size(4, 4)), BEYOND),
    "_chunk-offsets of one axis": (lambda i: chunk(i, offsets=size(0)), BEYOND),
    "_chunk-sizes of one axis": (lambda i: chunk(i, sizes=size(4)), BEYOND),
    "_chunk-both of one axis": (lambda i: chunk(i, offsets=size(0), sizes=size(4)), BEYOND),
    "_is-another record": (lambda i: places(i).update({place_key(i): dense()}), NO_PLACE),
    "_fields-with arguments": (lambda i: setattr(places(i)[place_key(i)], "args", (1,)), NO_PLACE),
    "_fields-no keys": (lambda i: setattr(places(i)[place_key(i)], "state", ()), NO_PLACE),
    "_fields-another key": (
        lambda i: place(i).update(colour="red"),
        "a _StorageInfo has a key colour",
    ),
    "_fields-too few": (lambda i: place(i).pop("length"), "a _StorageInfo has too few keys"),
    "_dtype-another record": (lambda i: part(i).update(properties=dense()), NO_PROPERTIES),
    "_dtype-another with such a state": (
        lambda i: setattr(part(i)["properties"], "of", Name("torch", "Size")),
        NO_PROPERTIES,
    ),
    "_dtype-a mapping": (
        lambda i: setattr(part(i)["properties"], "state", dict.fromkeys(range(5))),
        NO_PROPERTIES,
    ),
    "_dtype-four": (
        lambda i: part(i).update(properties=properties(F32, dense(), False, None)),
        NO_PROPERTIES,
    ),
    "_dtype-text": (typed("float32"), NO_DTYPE),
    "_dtype-of another module": (typed(Name("pathlib", "float32")), NO_DTYPE),
    "_dtype-another name": (typed(Name("torch", "Size")), NO_DTYPE),
    "_dtype-no layout": (typed(F32, layout=5), NOT_DENSE),
    "_dtype-a layout by another name": (
        typed(F32, layout=dense(by=Name("torch", "Size"))),
        NOT_DENSE,
    ),
    "_dtype-a sparse layout": (typed(F32, layout=dense("torch.sparse_coo")), NOT_DENSE),
    "_size-a number": (lambda i: part(i).update(size=5), NO_SIZE),
    "_size-another record": (
        lambda i: part(i).update(size=PickleRecord(Name("torch", "float32"), ((8, 3),))),
        NO_SIZE,
    ),
    "_size-nothing": (lambda i: part(i).update(size=SIZE), NO_SIZE),
    "_size-two": (lambda i: part(i).update(size=PickleRecord(SIZE.of, ((8, 3), (8, 3)))), NO_SIZE),
    "_size-a list": (lambda i: part(i).update(size=PickleRecord(SIZE.of, ([8, 3],))), NO_SIZE),
    "_size-seventeen axes": (
        lambda i: part(i).update(size=size(*[1] * 17)),
        "a tensor has 17 axes",
    ),
    "_count-true": (lambda i: place(i).update(offset=True), NO_NUMBER),
    "_count-text": (lambda i: place(i).update(offset="0"), NO_NUMBER),
    "_count-below 0": (lambda i: place(i).update(offset=-1), NO_NUMBER),
    "LIMIT-beyond it": (lambda i: place(i).update(offset=MOST + 1), NO_NUMBER),
    "_text-a number": (lambda i: parts(i).update({5: parts(i).pop(OBJECT)}), NO_TEXT),
    "_text-a control character": (
        lambda i: parts(i).update({"\x1b": parts(i).pop(OBJECT)}),
        NO_TEXT,
    ),
    "_file-a path of a number": (path(1), NO_TEXT),
    "_file-a path of text and a number": (path("a", 1), NO_TEXT),
    "_file-a path of nothing": (path(), OUT + "."),
    "_file-a path that leads out": (path("/", "etc", "passwd"), OUT + "/etc/passwd"),
    "_file-no name": (lambda i: place(i).update(relative_path=""), OUT),
    "_file-here": (lambda i: place(i).update(relative_path="."), OUT + "."),
    "_file-above": (lambda i: place(i).update(relative_path=".."), OUT + ".."),
    "_file-a folder": (lambda i: place(i).update(relative_path="a/b"), OUT + "a/b"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_an_index_is_said(what):
    index = tree()
    (change, message) = WRONG[what]
    change(index)
    with pytest.raises((Damaged, Unwanted)) as refusal:
        metadata.metadata_of(index)
    assert str(refusal.value) == message
    assert (type(refusal.value) is Unwanted) == (
        message == NOT_DENSE or message.startswith((OUT, "a checkpoint"))
    )


@pytest.mark.parametrize("value", [5, "x", Name(RECORDS, "Metadata")], ids="metadata_of-{}".format)
def test_what_is_no_record_is_no_index(value):
    with pytest.raises(Damaged, match="^it is not an index$"):
        metadata.metadata_of(value)


@pytest.mark.parametrize(
    "shape, dtype, does",
    [
        ((MOST,), "uint8", True),
        ((MOST,), "int16", False),
        ((0, MOST, 2), "uint8", False),
        ((0, MOST), "uint8", True),
        ((1 << 31, 1 << 32), "uint8", False),
        ((1,) * 70, "uint8", True),
        ((), "float64", True),
    ],
    ids=lambda value: f"fits-{value}",
)
def test_a_tensor_has_no_more_bytes_than_there_can_be(shape, dtype, does):
    assert metadata.fits(shape, getattr(torch, dtype)) is does
