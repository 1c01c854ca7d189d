"""Parse a pickle as data: plain values and names. Nothing is imported, called or changed. No torch.

Rule: whatever object a pickle would make, by whatever opcode, becomes a PickleRecord: a name,
arguments and a state. Time and memory are linear in the bytes: each opcode reads at most the bytes
that remain, and the number of objects is limited.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

MOST = 1 << 28  # bytes of a pickle; the index of the largest models has a fifth of it
# Limit of objects: one for each BYTES_EACH bytes, and SPARE more. A normal pickle takes about
# twelve bytes for a container or record; one object for each byte would take sixty times the
# pickle's size.
BYTES_EACH = 4
SPARE = 64
SHOWN = 100  # characters of untrusted text in a message
KEYS = (str, int, bool, float, type(None))  # types whose hash needs no recursion


class Damaged(ValueError):
    """These bytes are not a pickle of plain records."""


class Unwanted(ValueError):
    """A pickle asks for something that is not allowed; the message is a sentence about it."""


class Name(NamedTuple):
    """The name of a class or function in a pickle; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


class PickleRecord:
    """An object that a pickle would make by calling `of` with `args`, then setting `state`."""

    __slots__ = ("of", "args", "state")

    def __init__(self, of: Name, args: tuple):
        self.of = of
        self.args = args
        self.state = None


class PersistentId(NamedTuple):
    """torch.save's reference to a storage, which is another record of the file."""

    id: Any


def shown(text: str) -> str:
    """Return untrusted text safe for a terminal: short, and without control characters."""
    text = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return text if text.isprintable() else ascii(text)


def read(data: bytes, allowed: Mapping[str, Collection[str]]) -> Any:
    """Return the contents of a pickle: plain Python, Names, PickleRecords and PersistentIds.

    `allowed`: module -> the names that may occur. Objects may be shared and nested without limit:
    a caller that walks through them must bound both. Unwanted for a name or an opcode that normal
    pickles do not have, Damaged for any other error.
    """
    reader = _Reader(data, allowed)
    try:
        return reader.run()
    # it ends early, or uses a stack or memo entry that does not exist
    except (IndexError, UnicodeDecodeError, struct.error):
        raise Damaged(f"at byte {reader.at:,}") from None


class _Reader:
    """The state of a pickle machine: the stack, the positions of its marks, and the memo."""

    def __init__(self, data: bytes, allowed: Mapping[str, Collection[str]]):
        self.data = data
        self.allowed = allowed
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.objects_left = len(data) // BYTES_EACH + SPARE  # limit of containers and records

    def run(self) -> Any:
        data = self.data
        stop = pickle.STOP[0]
        while (opcode := data[self.at]) != stop:
            self.at += 1
            if opcode not in STEPS:
                self.refuse(data[self.at - 1 : self.at])
            STEPS[opcode](self)
        if len(self.stack) != 1 or self.marks:
            raise Damaged(f"at byte {self.at:,}")
        return self.stack[0]

    def refuse(self, opcode: bytes) -> None:
        known = pickletools.code2op.get(opcode.decode("latin1"))
        if known is None:
            raise Damaged(f"at byte {self.at:,}")
        raise Unwanted(f"a pickle with the opcode {known.name} is not loaded")

    def number(self, kind: str, size: int) -> Any:
        (value,) = struct.unpack_from(kind, self.data, self.at)
        self.at += size
        return value

    def take(self, size: int) -> bytes:
        """Return `size` bytes, or fewer at the end: the next opcode then raises an IndexError."""
        start = self.at
        self.at += size
        return self.data[start : self.at]

    def line(self) -> str:
        text, newline, _ = self.data[self.at : self.at + 1024].partition(b"\n")
        if not newline:
            raise IndexError
        self.at += len(text) + 1
        return text.decode()

    def push(self, container: Any) -> None:
        """Push a new container or record, and count it."""
        self.objects_left -= 1
        if self.objects_left < 0:
            raise Damaged(f"it makes too many objects for its size, up to byte {self.at:,}")
        self.stack.append(container)

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        if mark > len(self.stack):
            raise IndexError
        del self.stack[mark:]
        return items

    def named(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Damaged(f"at byte {self.at:,}")
        if name not in self.allowed.get(module, ()):
            raise Unwanted(f"a pickle that wants {Name(module, name)} is not loaded")
        self.stack.append(Name(module, name))


Step = Callable[[_Reader], object]


def _value(value: Any) -> Step:
    return lambda reader: reader.stack.append(value)


def _fixed(kind: str) -> Step:
    size = struct.calcsize(kind)
    return lambda reader: reader.stack.append(reader.number(kind, size))


def _text(kind: str) -> Step:
    size = struct.calcsize(kind)
    return lambda reader: reader.stack.append(reader.take(reader.number(kind, size)).decode())


def _bytes(kind: str) -> Step:
    size = struct.calcsize(kind)
    return lambda reader: reader.stack.append(reader.take(reader.number(kind, size)))


def _long(reader: _Reader) -> None:
    data = reader.take(reader.number("<B", 1))
    if len(data) > 8:
        raise Damaged(f"a number of more than 64 bits at byte {reader.at:,}")
    reader.stack.append(int.from_bytes(data, "little", signed=True))


def _tuple(reader: _Reader) -> None:
    reader.push(tuple(reader.since_mark()))


def _tuple_of(size: int) -> Step:
    def step(reader: _Reader) -> None:
        items = tuple(reader.stack[-size:])
        if len(items) != size:
            raise IndexError
        del reader.stack[-size:]
        reader.push(items)

    return step


def _list_of(reader: _Reader) -> list:
    if type(reader.stack[-1]) is not list:
        raise Damaged(f"items for something that is not a list, at byte {reader.at:,}")
    return reader.stack[-1]


def _append(reader: _Reader) -> None:
    item = reader.stack.pop()
    _list_of(reader).append(item)


def _appends(reader: _Reader) -> None:
    items = reader.since_mark()
    _list_of(reader).extend(items)


def _set_items(reader: _Reader, items: list[Any]) -> None:
    target = reader.stack[-1]
    if type(target) is not dict or len(items) % 2:
        raise Damaged(f"items for something that is not a mapping, at byte {reader.at:,}")
    for key in items[::2]:
        if not isinstance(key, (*KEYS, PickleRecord)):  # a nested tuple's hash would recurse
            raise Damaged(f"a key is not text, a number or a record, at byte {reader.at:,}")
    target.update(zip(items[::2], items[1::2], strict=True))


def _set_item(reader: _Reader) -> None:
    value = reader.stack.pop()
    key = reader.stack.pop()
    _set_items(reader, [key, value])


def _put(reader: _Reader, index: int) -> None:
    if index > len(reader.memo):
        raise IndexError
    reader.memo[index : index + 1] = [reader.stack[-1]]


def _name(reader: _Reader) -> None:
    reader.named(reader.line(), reader.line())


def _stack_name(reader: _Reader) -> None:
    name = reader.stack.pop()
    module = reader.stack.pop()
    reader.named(module, name)


def _make(reader: _Reader) -> None:
    """NEWOBJ and REDUCE: push a record of the object or call; an OrderedDict becomes a dict."""
    args = reader.stack.pop()
    of = reader.stack.pop()
    if type(of) is not Name:
        raise Unwanted("a pickle that calls something other than a class or function is not loaded")
    if type(args) is not tuple:
        raise Damaged(f"arguments that are not a tuple, at byte {reader.at:,}")
    reader.push({} if of == ("collections", "OrderedDict") and not args else PickleRecord(of, args))


def _build(reader: _Reader) -> None:
    state = reader.stack.pop()
    record = reader.stack[-1]
    if type(record) is not PickleRecord or record.state is not None:
        target = record if type(record) is Name else "an existing object"
        raise Unwanted(f"a pickle that changes {target} is not loaded")
    if type(state) not in (dict, tuple):
        raise Damaged(f"a state that is not a mapping, at byte {reader.at:,}")
    record.state = state


STEPS: dict[int, Step] = {
    opcode[0]: step
    for opcode, step in {
        pickle.PROTO: lambda reader: reader.take(1),
        pickle.FRAME: lambda reader: reader.take(8),
        pickle.MARK: lambda reader: reader.marks.append(len(reader.stack)),
        pickle.NONE: _value(None),
        pickle.NEWTRUE: _value(True),
        pickle.NEWFALSE: _value(False),
        pickle.BININT: _fixed("<i"),
        pickle.BININT1: _fixed("<B"),
        pickle.BININT2: _fixed("<H"),
        pickle.BINFLOAT: _fixed(">d"),
        pickle.LONG1: _long,
        pickle.SHORT_BINUNICODE: _text("<B"),
        pickle.BINUNICODE: _text("<I"),
        pickle.BINUNICODE8: _text("<Q"),
        pickle.SHORT_BINBYTES: _bytes("<B"),
        pickle.BINBYTES: _bytes("<I"),
        pickle.BINBYTES8: _bytes("<Q"),
        pickle.EMPTY_TUPLE: _value(()),
        pickle.TUPLE1: _tuple_of(1),
        pickle.TUPLE2: _tuple_of(2),
        pickle.TUPLE3: _tuple_of(3),
        pickle.TUPLE: _tuple,
        pickle.EMPTY_LIST: lambda reader: reader.push([]),
        pickle.APPEND: _append,
        pickle.APPENDS: _appends,
        pickle.EMPTY_DICT: lambda reader: reader.push({}),
        pickle.SETITEM: _set_item,
        pickle.SETITEMS: lambda reader: _set_items(reader, reader.since_mark()),
        pickle.MEMOIZE: lambda reader: reader.memo.append(reader.stack[-1]),
        pickle.BINPUT: lambda reader: _put(reader, reader.number("<B", 1)),
        pickle.LONG_BINPUT: lambda reader: _put(reader, reader.number("<I", 4)),
        pickle.BINGET: lambda reader: reader.stack.append(reader.memo[reader.number("<B", 1)]),
        pickle.LONG_BINGET: lambda reader: reader.stack.append(reader.memo[reader.number("<I", 4)]),
        pickle.GLOBAL: _name,
        pickle.STACK_GLOBAL: _stack_name,
        pickle.NEWOBJ: _make,
        pickle.REDUCE: _make,
        pickle.BUILD: _build,
        pickle.BINPERSID: lambda reader: reader.push(PersistentId(reader.stack.pop())),
    }.items()
}
