"""Megatron-Core's .idx files: what they say, and whether every entry of one is right.

The rule it keeps: nothing heavy on import, and no entry is believed that was not looked at. A wrong
entry is named by file, sequence, document and byte, before a data set opens the file.
"""

import bisect
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from mixtrain.errors import UserError

# The .idx layout is that of megatron/core/datasets/indexed_dataset.py: magic, version, dtype code,
# number of sequences, number of document boundaries; then lengths (int32) and byte offsets (int64)
# of the sequences, and boundaries (int64).
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# fmt: off
BYTES_OF_DTYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # uint8 int8 int16 int32 int64 uint16
# fmt: on
BLOCK = 1 << 18  # entries that are read at a time: a few MB


@dataclass(frozen=True)
class Index:
    """What an .idx file says: how many sequences and document boundaries there are, and what they fill of the .bin."""

    path: Path
    sequences: int
    boundaries: int
    token_bytes: int
    bin_bytes: int

    @property
    def parts(self) -> str:
        """What its entries are: Megatron's own tool may have written several sequences a document."""
        return "documents" if self.sequences == self.boundaries - 1 else "sequences"

    def offset(self, sequence: int) -> int:
        """Where the sequence begins in the .bin, in bytes; for the number of sequences, where the last one ends."""
        if sequence == self.sequences:
            return self.bin_bytes
        return self._number(self.at_offset(sequence), "<q")

    def document(self, sequence: int) -> int:
        """The document that the sequence is a part of, by boundaries that are in order."""
        return bisect.bisect_right(range(self.boundaries), sequence, key=self.boundary) - 1

    def boundary(self, number: int) -> int:
        """The first sequence of the document of this number; for the last boundary, the number of sequences."""
        return self._number(self.at_boundary(number), "<q")

    def at_length(self, sequence: int) -> int:
        """The byte of the .idx where the sequence's length is."""
        return HEADER.size + 4 * sequence

    def at_offset(self, sequence: int) -> int:
        return HEADER.size + 4 * self.sequences + 8 * sequence

    def at_boundary(self, number: int) -> int:
        return HEADER.size + 12 * self.sequences + 8 * number

    def _number(self, position: int, layout: str) -> int:
        with open(self.path, "rb") as stream:
            stream.seek(position)
            return struct.unpack(layout, stream.read(struct.calcsize(layout)))[0]


def read_index(prefix: str) -> Index:
    """What prefix.idx says by its header and its last entry, checked against the sizes of both files, in milliseconds.

    Raises UserError.
    """
    idx = Path(f"{prefix}.idx")
    bin_ = Path(f"{prefix}.bin")
    missing = [str(path) for path in (bin_, idx) if not path.is_file()]
    if missing:
        without = re.sub(r"\.(bin|idx)$", "", prefix)
        hint = f"; data.data_path takes the prefix {without}" if without != prefix else ""
        raise UserError(f"data.data_path: no file {' and no file '.join(missing)}{hint}")
    idx_bytes = idx.stat().st_size
    with open(idx, "rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(
            f"{idx}: not a Megatron index, it starts with {header[:9]!r} instead of {MAGIC!r}"
        )
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != 1 or code not in BYTES_OF_DTYPE:
        raise UserError(
            f"{idx}: version {version}, token type {code}; version 1 with whole numbers is read"
        )
    wanted = HEADER.size + 12 * sequences + 8 * boundaries
    if idx_bytes != wanted:
        raise UserError(
            f"{idx}: {idx_bytes:,} bytes, but its header ({sequences:,} sequences) makes it"
            f" {wanted:,}"
        )
    if not sequences:
        raise UserError(f"{idx}: an empty data set, it has no sequence")
    if not boundaries:
        raise UserError(
            f"{idx}: no document boundary; an index of {sequences:,} sequences has two or more"
        )
    return _with_last_entry(
        Index(idx, sequences, boundaries, BYTES_OF_DTYPE[code], bin_.stat().st_size), bin_
    )


def _with_last_entry(index: Index, bin_: Path) -> Index:
    """The index, if the .bin ends where its last entry says."""
    last = index.sequences - 1
    length = index._number(index.at_length(last), "<i")
    offset = index.offset(last)
    if length < 0 or offset < 0:
        at = index.at_length(last) if length < 0 else index.at_offset(last)
        raise UserError(
            f"{index.path}: the last sequence has {length:,} tokens from byte {offset:,} on (byte"
            f" {at:,})"
        )
    bin_bytes = offset + length * index.token_bytes
    if index.bin_bytes != bin_bytes:
        raise UserError(
            f"{bin_}: {index.bin_bytes:,} bytes, but by {index.path} it should have {bin_bytes:,}"
        )
    if not bin_bytes:
        raise UserError(
            f"{bin_}: an empty data set, its {index.sequences} {index.parts} have no token"
        )
    return index


def entries_problem(index: Index) -> str | None:
    """The first wrong entry of the whole index, as a sentence with its file, document and byte; None if all are right.

    Reads 20 bytes a sequence, in blocks: seconds for 10^8 sequences, and some MB of memory for any number.
    """
    return _boundary_problem(index) or _sequence_problem(index)


def _boundary_problem(index: Index) -> str | None:
    """Boundaries begin with 0, do not fall, and end with the number of sequences."""
    import numpy

    before = 0
    for first, (values,) in _blocks(index, index.boundaries, (index.at_boundary(0), "<i8")):
        wrong = (values < numpy.concatenate(([before], values[:-1]))) | (values > index.sequences)
        if first == 0:
            wrong[0] = values[0] != 0
        if wrong.any():
            place = int(wrong.argmax())
            number = first + place
            value = int(values[place])
            before = int(values[place - 1]) if place else before
            rule = "the first must be 0" if number == 0 else f"the one before it is {before:,}"
            if value > index.sequences:
                rule = f"there are {index.sequences:,} sequences"
            at = index.at_boundary(number)
            return (
                f"{index.path}: document boundary {number:,} (byte {at:,}) is {value:,}, but {rule}"
            )
        before = int(values[-1])
    if before != index.sequences:
        at = index.at_boundary(index.boundaries - 1)
        return (
            f"{index.path}: the last document boundary (byte {at:,}) is {before:,}, but there are"
            f" {index.sequences:,} sequences"
        )
    return None


def _sequence_problem(index: Index) -> str | None:
    """Sequences lie in the .bin one after the other: each begins where the one before it ends, the first at byte 0."""
    import numpy

    end = 0
    arrays = (index.at_length(0), "<i4"), (index.at_offset(0), "<i8")
    for first, (lengths, offsets) in _blocks(index, index.sequences, *arrays):
        ends = end + numpy.cumsum(lengths * numpy.int64(index.token_bytes))
        begins = numpy.concatenate(([end], ends[:-1]))
        wrong = (lengths < 0) | (offsets != begins) | (ends > index.bin_bytes)
        if wrong.any():
            place = int(wrong.argmax())
            return _words(
                index,
                first + place,
                *(int(array[place]) for array in (lengths, offsets, begins, ends)),
            )
        end = int(ends[-1])
    return None


def _words(index: Index, sequence: int, length: int, offset: int, begin: int, end: int) -> str:
    """What is wrong with a sequence that has this length in tokens and this offset, where `begin` is the right one."""
    here = f"{index.path}: sequence {sequence:,} of document {index.document(sequence):,}"
    whole = f"of the {index.bin_bytes:,} bytes of {index.path.with_suffix('.bin')}"
    if length < 0:
        return f"{here} has {length:,} tokens (byte {index.at_length(sequence):,}); 0 is the least"
    if offset != begin:
        before = f"the one before it ends at {begin:,}" if sequence else "the first begins at 0"
        return (
            f"{here} begins at byte {offset:,} {whole} (byte {index.at_offset(sequence):,}),"
            f" but {before}"
        )
    return (
        f"{here} has {length:,} tokens (byte {index.at_length(sequence):,}) and so ends at"
        f" byte {end:,} {whole}"
    )


def _blocks(index: Index, count: int, *arrays: tuple[int, str]):
    """(number of the first entry, a block of each array), the arrays given by their byte in the .idx and their type.

    Read, not mapped: a file that is cut meanwhile is a short block and not a signal that ends the process.
    """
    import numpy

    with open(index.path, "rb") as stream:
        for first in range(0, count, BLOCK):
            blocks = []
            for position, kind in arrays:
                stream.seek(position + first * numpy.dtype(kind).itemsize)
                blocks.append(numpy.fromfile(stream, kind, min(BLOCK, count - first)))
            if any(len(block) < min(BLOCK, count - first) for block in blocks):
                raise UserError(
                    f"{index.path}: the file was cut while it was read; is it still being written?"
                )
            yield first, blocks
