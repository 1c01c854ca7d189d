"""Each opcode of a pickle: its result, and the message if it is incomplete; bytes by hand."""

from __future__ import annotations

import struct

import pytest
from evil_pickles import name, text

from mixtrain.checkpoint import pickles
from mixtrain.checkpoint.pickles import Damaged, Name, PersistentId, PickleRecord, Unwanted

LONGEST = "b" * 1023
ALLOWED = {"a": {"B"}, LONGEST: {"C"}, "collections": {"OrderedDict"}}
B = name("a", "B")
ORDERED = name("collections", "OrderedDict")
A_B = Name("a", "B")


def seen(value: object) -> object:
    """Return a value in which PickleRecords show their contents."""
    if type(value) is PickleRecord:
        return "Record", value.of, seen(value.args), seen(value.state)
    if type(value) in (list, tuple):
        return type(value)(map(seen, value))
    if type(value) is dict:
        return {seen(key): seen(item) for key, item in value.items()}
    return value


def record(args: object = (), state: object = None) -> tuple:
    return "Record", A_B, args, state


# Valid pickles. A test's name begins with the table or function that it tests.
READ = {
    "STEPS-PROTO": (b"\x80\x02N", None),
    "STEPS-FRAME": (b"\x95" + bytes(8) + b"N", None),
    "STEPS-NEWTRUE": (b"\x88", True),
    "STEPS-NEWFALSE": (b"\x89", False),
    "STEPS-BININT": (b"J\xfe\xff\xff\xff", -2),
    "STEPS-BININT1": (b"K\xff", 255),
    "STEPS-BININT2": (b"M\xff\xfe", 0xFEFF),
    "STEPS-BINFLOAT": (b"G" + struct.pack(">d", 1.5), 1.5),
    "STEPS-SHORT_BINUNICODE": (b"\x8c\x02ab", "ab"),
    "STEPS-BINUNICODE": (b"X\x02\0\0\0\xc3\xa4", "ä"),
    "STEPS-BINUNICODE8": (b"\x8d\x01" + bytes(7) + b"a", "a"),
    "STEPS-SHORT_BINBYTES": (b"C\x02a\xff", b"a\xff"),
    "STEPS-BINBYTES": (b"B\x01\0\0\0a", b"a"),
    "STEPS-BINBYTES8": (b"\x8e\x01" + bytes(7) + b"a", b"a"),
    "STEPS-EMPTY_TUPLE": (b")", ()),
    "STEPS-TUPLE1": (b"]N\x85\x86", ([], (None,))),
    "STEPS-TUPLE2": (b"]NN\x86\x86", ([], (None, None))),
    "STEPS-TUPLE3": (b"]NNN\x87\x86", ([], (None, None, None))),
    "STEPS-MEMOIZE": (b"NK\x05\x94h\0\x87", (None, 5, 5)),
    "STEPS-BINPUT": (b"NK\x05q\0h\0\x87", (None, 5, 5)),
    "STEPS-LONG_BINPUT": (b"NK\x05r\0\0\0\0j\0\0\0\0\x87", (None, 5, 5)),
    "STEPS-STACK_GLOBAL": (text("a") + text("B") + b"\x93", A_B),
    "STEPS-NEWOBJ": (B + b")\x81", record()),
    "STEPS-BINPERSID": (b"K\x01Q", PersistentId(1)),
    "_long-of eight bytes": (b"\x8a\x08" + b"\xff" * 8, -1),
    "_long-of one": (b"\x8a\x01\x7f", 127),
    "_tuple-of nothing": (b"(t", ()),
    "_tuple-of two": (b"N(K\x01K\x02t\x86", (None, (1, 2))),
    "_append-twice": (b"]K\x01aK\x02a", [1, 2]),
    "_appends-some": (b"](K\x01K\x02e", [1, 2]),
    "_set_item-one": (b"}K\x01K\x02s", {1: 2}),
    "_set_items-some": (b"}(K\x01)K\x03)K\x05Nu", {1: (), 3: (), 5: None}),
    "KEYS-all": (
        b"}(" + text("k") + b"NK\x01NNNG" + bytes(8) + b"Nu",
        {"k": None, 1: None, None: None, 0.0: None},
    ),
    "_set_items-a record for a key": (b"}" + B + b")\x81Ns", {record(): None}),
    "_put-another in its place": (b"(K\x01q\0K\x02q\1K\x03q\0h\1t", (1, 2, 3, 2)),
    "_name-a name": (B, A_B),
    "line-a name of 1023 characters": (name(LONGEST, "C"), Name(LONGEST, "C")),
    "_make-with arguments": (B + b"N\x85R", record((None,))),
    "_make-an ordered mapping": (ORDERED + b")R", {}),
    "_make-an ordered mapping of something": (
        ORDERED + b"N\x85R",
        ("Record", Name("collections", "OrderedDict"), (None,), None),
    ),
    "_build-of a mapping": (B + b")\x81}b", record(state={})),
    "_build-of a tuple": (B + b")\x81N\x85b", record(state=(None,))),
    "_build-beside another": (b"N" + B + b")\x81)b\x86", (None, record(state=()))),
}


@pytest.mark.parametrize("what", READ)
def test_an_opcode_is_read_as_what_it_says(what):
    data, expected = READ[what]
    assert repr(seen(pickles.read(data + b".", ALLOWED))) == repr(expected)  # repr, since True == 1


AT = "at byte {}".format
LONG = b"\x8a\x09" + b"\x01" * 9
REFUSED = {
    "run-nothing": (b"", Damaged, AT(0)),
    "run-no value": (b".", Damaged, AT(0)),
    "run-two values": (b"NN.", Damaged, AT(2)),
    "run-an open mark": (b"N(.", Damaged, AT(2)),
    "run-no end": (b"N", Damaged, AT(1)),
    "refuse-another opcode": (b"N0.", Unwanted, "a pickle with the opcode POP is not loaded"),
    "refuse-no opcode": (b"N\xff.", Damaged, AT(2)),
    "read-half a number": (b"J\0.", Damaged, AT(1)),
    "read-no text": (b"X\x01\0\0\0\xff.", Damaged, AT(6)),
    "read-no place of the memo": (b"h\1.", Damaged, AT(2)),
    "take-fewer bytes": (b"C\x05ab.", Damaged, AT(7)),
    "take-2^64 - 1 bytes": (b"\x8d" + b"\xff" * 8 + b"x.", Damaged, f"at byte {2**64 + 8:,}"),
    "STEPS-BINPUT at the end": (b"Nq\0", Damaged, AT(3)),
    "STEPS-LONG_BINPUT at the end": (b"Nr\0\0\0\0", Damaged, AT(6)),
    "STEPS-BINGET at the end": (b"Nq\0h\0", Damaged, AT(5)),
    "STEPS-LONG_BINGET at the end": (b"Nq\0j\0\0\0\0", Damaged, AT(8)),
    "_long-at the end": (b"\x8a\0", Damaged, AT(2)),
    "_long-of nine bytes": (LONG + b".", Damaged, f"a number of more than 64 bits {AT(11)}"),
    "line-no end": (b"ca\nB", Damaged, AT(3)),
    "line-1024 characters": (b"c" + b"a" * 1024 + b"\nB\n.", Damaged, AT(1)),
    "line-no text": (b"c\xff\nB\n.", Damaged, AT(3)),
    "since_mark-what is below it is gone": (b"NN(\x86t\x86.", Damaged, AT(5)),
    "named-no module": (b"K\x01" + text("B") + b"\x93.", Damaged, AT(9)),
    "named-no name": (text("a") + b"K\x01\x93.", Damaged, AT(9)),
    "named-another name": (
        name("a", "C") + b".",
        Unwanted,
        "a pickle that wants a.C is not loaded",
    ),
    "named-another module": (
        name("b", "B") + b".",
        Unwanted,
        "a pickle that wants b.B is not loaded",
    ),
    "step-two of one": (b"N\x86.", Damaged, AT(2)),
    "_list_of-a mapping": (b"}Na.", Damaged, f"items for something that is not a list, {AT(3)}"),
    "_set_items-a list": (
        b"](NNu.",
        Damaged,
        f"items for something that is not a mapping, {AT(5)}",
    ),
    "_set_items-a key without a value": (
        b"}(Nu.",
        Damaged,
        f"items for something that is not a mapping, {AT(4)}",
    ),
    "_set_items-a tuple for a key": (
        b"}(NN)Nu.",
        Damaged,
        f"a key is not text, a number or a record, {AT(7)}",
    ),
    "_put-a far place": (b"Nq\1.", Damaged, AT(3)),
    "_put-one place twice": (b"Nq\0q\0h\1\x86.", Damaged, AT(7)),
    "_make-a number": (
        b"K\x01)R.",
        Unwanted,
        "a pickle that calls something other than a class or function is not loaded",
    ),
    "_make-no arguments": (B + b"NR.", Damaged, f"arguments that are not a tuple, {AT(7)}"),
    "_build-a name": (B + b"}b.", Unwanted, "a pickle that changes a.B is not loaded"),
    "_build-a mapping": (
        b"}}b.",
        Unwanted,
        "a pickle that changes an existing object is not loaded",
    ),
    "_build-twice": (
        B + b")\x81}b}b.",
        Unwanted,
        "a pickle that changes an existing object is not loaded",
    ),
    "_build-a list": (B + b")\x81]b.", Damaged, f"a state that is not a mapping, {AT(9)}"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_with_a_pickle_is_said(what):
    data, kind, message = REFUSED[what]
    with pytest.raises((Damaged, Unwanted)) as refusal:
        pickles.read(data, ALLOWED)
    assert (type(refusal.value), str(refusal.value)) == (kind, message)


def test_a_pickle_makes_a_container_for_each_four_bytes_and_sixty_four_more():
    assert pickles.read(b"(" + b"]" * 85 + b"t.", {}) == ([],) * 85  # 88 bytes, 86 containers
    with pytest.raises(Damaged, match="it makes too many objects for its size, up to byte 88"):
        pickles.read(b"(" + b"]" * 86 + b"t.", {})


@pytest.mark.parametrize(
    "given, message",
    [
        ("a" * 100, "a" * 100),
        ("a" * 101, "a" * 100 + "..."),
        ("\x1b[2J", "'\\x1b[2J'"),
        ("\x1b" + "a" * 100, "'\\x1b" + "a" * 99 + "...'"),
    ],
    ids=["shown-100", "shown-101", "shown-control", "shown-both"],
)
def test_a_strangers_text_is_shown_short_and_without_control_characters(given, message):
    assert pickles.shown(given) == message
