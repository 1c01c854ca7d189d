"""Small objects of torch.save: each limit, and each thing that is not a plain object."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from archives import message_of, opened, pickled, saved, zipped
from evil_pickles import name, records

from mixtrain.checkpoint import archive
from mixtrain.checkpoint.archive import _PlainObjects
from mixtrain.checkpoint.pickles import Name, PickleRecord

FLOAT = Name("torch", "FloatStorage")
ENCODE = Name("_codecs", "encode")
DTYPE = Name("numpy", "dtype")
ONE = saved(torch.arange(3.0))


def nested(value: object, depth: int, kind: Callable[[object], object]) -> object:
    return nested(kind(value), depth - 1, kind) if depth else value


@pytest.mark.parametrize(
    "kind",
    [lambda value: [value], lambda value: {0: value}],
    ids=["MAX_DEPTH-list", "MAX_DEPTH-mapping"],
)
def test_an_object_is_sixteen_deep(kind):
    deep = nested(None, 16, kind)
    assert opened(saved(deep)).plain() == deep
    assert (
        message_of(lambda: opened(saved(kind(deep))).plain()) == "Damaged: it is not a small object"
    )


def test_an_object_has_65536_parts():
    assert opened(saved([None] * 65535)).plain() == [None] * 65535
    assert (
        message_of(lambda: opened(saved([None] * 65536)).plain())
        == "Damaged: it is not a small object"
    )


def test_the_numbers_of_an_object_are_no_more_than_its_bytes():
    there = opened(ONE)
    plain = _PlainObjects(there)
    plain.bytes_left = 23  # one tensor takes 12 bytes: two take one more than this
    assert plain.convert(there.tree(), 0).tolist() == [0, 1, 2]
    assert (
        message_of(lambda: plain.convert(there.tree(), 0))
        == "Damaged: it has more numbers than bytes"
    )
    plain.bytes_left = 12
    assert plain.convert(there.tree(), 0).tolist() == [0, 1, 2]


def test_plain_objects_and_arrays_are_read_as_they_are():
    given = {"a": [1, (True, None)], True: 2.5, None: b"\xff\0", 1.5: "x", 7: False}
    assert repr(opened(saved(given)).plain()) == repr(given)
    assert pickled(b"C\1a").plain() == b"a"
    array = numpy.arange(5, dtype="u4")
    read = opened(saved(array)).plain()
    assert (read.dtype, read.tolist(), read.flags.writeable) == (array.dtype, [0, 1, 2, 3, 4], True)
    old = records(array)
    old["archive/data.pkl"] = old["archive/data.pkl"].replace(
        b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    )
    assert opened(zipped(old)).plain().tolist() == [0, 1, 2, 3, 4]


CODECS = name("_codecs", "encode")
UNWANTED = {
    "convert-a name": (name("torch", "float32"), "torch.float32"),
    "convert-numbers elsewhere": (b"NQ", "more than plain objects"),
    "convert-a record for a key": (b"}(K\1N" + CODECS + b")RNu", "more than plain objects"),
    "make-another": (name("argparse", "Namespace") + b")R", "argparse.Namespace"),
}


@pytest.mark.parametrize("what", UNWANTED)
def test_what_is_not_plain_is_named(what):
    data, wanted = UNWANTED[what]
    assert (
        message_of(pickled(data).plain) == f"Unwanted: a pickle that wants {wanted} is not loaded"
    )


NO_BYTES = {
    "_encoded-a number": 5,
    "_encoded-another record": PickleRecord(FLOAT, ("a", "latin1")),
    "_encoded-one argument": PickleRecord(ENCODE, ("a",)),
    "_encoded-three": PickleRecord(ENCODE, ("a", "latin1", "strict")),
    "_encoded-bytes": PickleRecord(ENCODE, (b"a", "latin1")),
    "_encoded-another code": PickleRecord(ENCODE, ("a", "utf8")),
    "_encoded-another letter": PickleRecord(ENCODE, ("\u1234", "latin1")),
}


@pytest.mark.parametrize("what", NO_BYTES)
def test_bytes_are_text_in_latin1(what):
    assert (
        archive._encoded(PickleRecord(ENCODE, ("\xff", "latin1")))
        == archive._encoded(b"\xff")
        == b"\xff"
    )
    assert (
        message_of(lambda: archive._encoded(NO_BYTES[what]))
        == "Damaged: there are no bytes where some should be"
    )


def array(*state: object) -> PickleRecord:
    made = PickleRecord(Name("numpy._core.multiarray", "_reconstruct"), ())
    made.state = state
    return made


def of_type(
    of: Name = DTYPE, kind: str = "u4", state: tuple | None = (3, "<", None)
) -> PickleRecord:
    made = PickleRecord(of, (kind, False, True))
    made.state = state
    return made


def listed() -> PickleRecord:
    made = array()
    made.state = [*HONEST]
    return made


HONEST = (1, (2,), of_type(), False, bytes(8))
NO_STATE = "Damaged: an array has no state"
OTHER = "Unwanted: a numpy array of a dtype other than uint32 is not loaded"
OTHERS = "Damaged: the data of an array do not fit its shape"
ARRAYS = {
    "_array-a list": (listed(), NO_STATE),
    "_array-four": (array(*HONEST[:4]), NO_STATE),
    "_array-no dtype": (array(1, (2,), "u4", False, bytes(8)), NO_STATE),
    "_array-another record": (array(1, (2,), of_type(ENCODE), False, bytes(8)), OTHER),
    "_array-another dtype": (array(1, (2,), of_type(kind="i4"), False, bytes(8)), OTHER),
    "_array-another order": (array(1, (2,), of_type(state=(3, ">", None)), False, bytes(8)), OTHER),
    "_array-no order": (array(1, (2,), of_type(state=None), False, bytes(8)), OTHER),
    "_array-two axes": (array(1, (2, 1), of_type(), False, bytes(8)), OTHERS),
    "_array-no axes": (array(1, (), of_type(), False, bytes(4)), OTHERS),
    "_array-three numbers": (array(1, (3,), of_type(), False, bytes(8)), OTHERS),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_what_is_wrong_with_an_array_is_said(what):
    record, expected = ARRAYS[what]
    assert archive._array(array(*HONEST)).tolist() == [0, 0]
    assert message_of(lambda: archive._array(record)) == expected
