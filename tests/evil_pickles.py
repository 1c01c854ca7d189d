"""Pickles that no honest program writes, for tests: by opcode, by hand, and by chance. Protocols
without frames.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import pickletools
import random
import struct
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

MARKER = "the place of the attack"
WATCHED = (
    "open",
    "exec",
    "compile",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "shutil.",
    "tempfile.",
)
_seen: list[str] | None = None


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


# BUILD with (None, {"_str": "it was set"})
SET = b"N}" + text("_str") + text("it was set") + b"s\x86b"
STATE = b"}" + text("_str") + text("it was set") + b"sb"
ARGUMENT = b"(" + text("x") + b"t"
# opcode -> what an attacker makes of a name with it
OPCODES = {
    "BUILD": lambda m, n: name(m, n) + SET,
    "BUILD of a mapping": lambda m, n: name(m, n) + STATE,
    "REDUCE": lambda m, n: name(m, n) + ARGUMENT + b"R",
    "REDUCE, BUILD": lambda m, n: name(m, n) + ARGUMENT + b"R" + SET,
    "REDUCE of what is made": lambda m, n: name(m, n) + b")R)R",
    "NEWOBJ": lambda m, n: name(m, n) + ARGUMENT + b"\x81",
    "NEWOBJ, BUILD": lambda m, n: name(m, n) + b")\x81" + SET,
    "NEWOBJ_EX": lambda m, n: name(m, n) + b")}\x92",
    "INST": lambda m, n: b"(" + text("x") + f"i{m}\n{n}\n".encode(),
    "OBJ": lambda m, n: b"(" + name(m, n) + text("x") + b"o",
    "EXT1": lambda m, n: b"\x82\x01" + SET,
    "EXT4": lambda m, n: b"\x84\x01\0\0\0" + SET,
    "STACK_GLOBAL": lambda m, n: text(m) + text(n) + b"\x93" + SET,
    "STACK_GLOBAL of an attribute": lambda m, n: text(m) + text(f"{n}.__init__") + b"\x93" + SET,
}


def small_index(planner_data: object = MARKER) -> Metadata:
    """An index as Megatron-Core writes it, of two tensors and an object."""
    properties = TensorProperties(torch.bfloat16)
    parts = {}
    places = {}
    items = []
    for key in ("embedding.weight", "decoder.weight"):
        chunks = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([4, 3])) for at in (0, 4)]
        parts[key] = TensorStorageMetadata(properties, torch.Size([8, 3]), chunks)
        for number, chunk in enumerate(chunks):
            index = MetadataIndex(key, chunk.offsets, number)
            places[index] = _StorageInfo("__0_0.distcp", 700 * len(places), 700)
            data = TensorWriteData(chunk, properties, torch.Size([8, 3]))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    parts["rng_state/shard_0_1"] = BytesStorageMetadata()
    places[MetadataIndex("rng_state/shard_0_1")] = _StorageInfo("__0_1.distcp", 0, 9000)
    index = Metadata(parts, planner_data, places, StorageMeta(), "1.0.0")
    index.all_local_plans = [SavePlan(items)]
    return index


def index_with(attack: bytes) -> bytes:
    """An index that is otherwise as it should be, with an attack where its planner's data lie."""
    return INDEX.replace(text(MARKER), attack)


def archive_with(attack: bytes, value: object = None) -> bytes:
    """A file of torch.save's with an attack in its pickle: at the MARKER in `value`."""
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as after:
        for file, data in (records(value) if value else COMMON).items():
            after.writestr(file, data.replace(text(MARKER), attack))
    return evil.getvalue()


def records(value: object) -> dict[str, bytes]:
    """The records in the file that torch.save makes of something."""
    saved = io.BytesIO()
    torch.save(value, saved)
    with zipfile.ZipFile(saved) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


COMMON = records({"iteration": 2, "args": MARKER})
INDEX = pickle.dumps(small_index(), protocol=3)


def found(module: str, of: str) -> object:
    try:
        return getattr(importlib.import_module(module), of, None)
    except ImportError:  # another version's
        return None


def attributes(things: list[object]) -> list[dict]:
    """What a pickle could have changed of classes, functions and members of enumerations."""
    members = [member for thing in things for member in getattr(thing, "__members__", {}).values()]
    holders = [thing for thing in [*things, *members] if hasattr(thing, "__dict__")]
    # copyreg puts __slotnames__ into a class of which something is pickled, as the tests do
    return [
        {key: value for key, value in vars(thing).items() if key != "__slotnames__"}
        for thing in holders
    ]


def alone(outcome: Path, function: Callable[[], str]) -> tuple[int, str]:
    """(exit code, what the function returned or its traceback) in a forked child, which leaves it
    in the file.

    A process that has watched is slow ever after: Python tells it of every id() too.
    """
    child = os.fork()
    if not child:
        try:
            outcome.write_text(function())
        except BaseException:
            outcome.write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    code = os.waitpid(child, 0)[1]
    return code, outcome.read_text() if outcome.exists() else "nothing"


class Watch:
    """The audited events of this process while it is open: files, processes, code. For a child: see
    `alone`.
    """

    def __enter__(self) -> list[str]:
        global _seen
        if _seen is None:
            sys.addaudithook(_note)
        _seen = []
        return _seen

    def __exit__(self, *_) -> None:
        global _seen
        _seen = None


def _note(event: str, args: tuple) -> None:
    if _seen is not None and event.startswith(WATCHED):
        _seen.append(f"{event} {args[:1]}")


def mutants(bases: list[bytes], attacks: list[bytes], seed: int) -> Iterator[tuple[int, bytes]]:
    """(number of the base, bytes) without end: changed by opcode where a base is a pickle, and by
    byte.
    """
    chance = random.Random(seed)
    ends = [
        [at for _, _, at in pickletools.genops(base)] if base[:1] == b"\x80" else None
        for base in bases
    ]
    while True:
        # large ones take long
        (number,) = chance.choices(range(len(bases)), [len(base) ** -0.5 for base in bases])
        data = bytearray(bases[number])
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            places = ends[number]
            at = (
                chance.choice(places)
                if places and chance.random() < 0.7
                else chance.randrange(len(data))
            )
            _mutate(data, min(at, len(data)), chance, attacks)
        yield number, bytes(data)


def _mutate(data: bytearray, at: int, chance: random.Random, attacks: list[bytes]) -> None:
    kind = chance.randrange(7)
    length = chance.choice((1, 2, 4, 8, 40, 400))
    if kind == 0:
        data[at : at + 1] = bytes([chance.randrange(256)])
    elif kind == 1:
        data[at:at] = chance.choice(attacks)
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length] * chance.choice((1, 2, 50))
    elif kind == 4:
        other = chance.randrange(len(data) + 1)
        data[at : at + length] = data[other : other + length]
    elif kind == 5:
        data[at : at + 8] = chance.choice(
            (b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 8, b"\xff\xff\xff\x7f")
        )
    else:
        opcode = chance.choice([*pickletools.code2op]).encode("latin1")
        data[at:at] = opcode
