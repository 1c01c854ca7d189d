"""Reads and checks Megatron-Core's .idx files.

Rule: importing this module imports nothing heavy. A wrong entry is reported with file, sequence,
document and byte before a dataset opens the file.
"""

import bisect
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from mixtrain.errors import UserError

# Layout of an .idx, from megatron/core/datasets/indexed_dataset.py: magic, version, dtype code,
# number of sequences, number of document boundaries; then the sequences' lengths (int32) and byte
# offsets (int64), and the document boundaries (int64).
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
BYTES_OF_DTYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # uint8 int8 int16 int32 int64 uint16
BLOCK = 1 << 18  # entries read at a time: a few MB


@dataclass(frozen=True)
class IdxFile:
    """The header of an .idx file and the size of its .bin, with access to single entries."""

    path: Path
    sequences: int
    boundaries: int
    token_bytes: int
    bin_bytes: int

    @property
    def entry_kind(self) -> str:
        """Return "sequences" if documents have several (Megatron's own tool), else "documents"."""
        return "documents" if self.sequences == self.boundaries - 1 else "sequences"

    def offset(self, sequence: int) -> int:
        """Return the byte of the .bin where a sequence begins; for `sequences`, the .bin's end."""
        if sequence == self.sequences:
            return self.bin_bytes
        return self._number(self.at_offset(sequence), "<q")

    def document(self, sequence: int) -> int:
        """Return the document that contains the sequence. The boundaries must be in order."""
        return bisect.bisect_right(range(self.boundaries), sequence, key=self.boundary) - 1

    def boundary(self, number: int) -> int:
        """Return a document's first sequence; for the last boundary, the number of sequences."""
        return self._number(self.at_boundary(number), "<q")

    def at_length(self, sequence: int) -> int:
        """Return the byte of the .idx where the sequence's length is stored."""
        return HEADER.size + 4 * sequence

    def at_offset(self, sequence: int) -> int:
        return HEADER.size + 4 * self.sequences + 8 * sequence

    def at_boundary(self, number: int) -> int:
        return HEADER.size + 12 * self.sequences + 8 * number

    def _number(self, position: int, layout: str) -> int:
        with open(self.path, "rb") as stream:
            stream.seek(position)
            return struct.unpack(layout, stream.read(struct.calcsize(layout)))[0]


def read_index(prefix: str) -> IdxFile:
    """Read the header and last entry of PREFIX.idx; check them against the sizes of both files.

    Takes milliseconds. Raises UserError.
    """
    idx = Path(f"{prefix}.idx")
    bin_ = Path(f"{prefix}.bin")
    missing = [str(path) for path in (bin_, idx) if not path.is_file()]
    if missing:
        bare_prefix = re.sub(r"\.(bin|idx)$", "", prefix)
        hint = f"; data.data_path takes the prefix {bare_prefix}" if bare_prefix != prefix else ""
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
            f"{idx}: version {version}, token type {code}; only version 1 with an integer token"
            " type can be read"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if idx_bytes != expected:
        raise UserError(
            f"{idx}: {idx_bytes:,} bytes, but its header ({sequences:,} sequences) implies"
            f" {expected:,}"
        )
    if not sequences:
        raise UserError(f"{idx}: an empty data set, it has no sequence")
    if not boundaries:
        raise UserError(
            f"{idx}: no document boundary; an index of {sequences:,} sequences has two or more"
        )
    index = IdxFile(idx, sequences, boundaries, BYTES_OF_DTYPE[code], bin_.stat().st_size)
    _check_last_entry(index, bin_)
    return index


def _check_last_entry(index: IdxFile, bin_: Path) -> None:
    """Raise UserError unless the .bin ends where the last sequence ends."""
    last = index.sequences - 1
    length = index._number(index.at_length(last), "<i")
    offset = index.offset(last)
    if length < 0 or offset < 0:
        position = index.at_length(last) if length < 0 else index.at_offset(last)
        raise UserError(
            f"{index.path}: the last sequence has {length:,} tokens from byte {offset:,} on (byte"
            f" {position:,})"
        )
    bin_bytes = offset + length * index.token_bytes
    if index.bin_bytes != bin_bytes:
        raise UserError(
            f"{bin_}: {index.bin_bytes:,} bytes, but {index.path} implies {bin_bytes:,}"
        )
    if not bin_bytes:
        raise UserError(
            f"{bin_}: an empty data set, its {index.sequences} {index.entry_kind} have no token"
        )


def entries_problem(index: IdxFile) -> str | None:
    """Return a sentence on the first wrong entry (file, document, byte); None if all are right.

    Reads 20 bytes per sequence, in blocks: seconds for 10^8 sequences, a few MB of memory.
    """
    return _boundary_problem(index) or _sequence_problem(index)


def _boundary_problem(index: IdxFile) -> str | None:
    """Check that boundaries begin with 0, never decrease, and end with the number of sequences."""
    import numpy

    previous = 0
    for first, (values,) in _blocks(index, index.boundaries, (index.at_boundary(0), "<i8")):
        wrong = (values < numpy.concatenate(([previous], values[:-1]))) | (values > index.sequences)
        if first == 0:
            wrong[0] = values[0] != 0
        if wrong.any():
            i = int(wrong.argmax())
            number = first + i
            value = int(values[i])
            previous = int(values[i - 1]) if i else previous
            rule = "the first must be 0" if number == 0 else f"the one before it is {previous:,}"
            if value > index.sequences:
                rule = f"there are {index.sequences:,} sequences"
            position = index.at_boundary(number)
            return (
                f"{index.path}: document boundary {number:,} (byte {position:,}) is {value:,}, but"
                f" {rule}"
            )
        previous = int(values[-1])
    if previous != index.sequences:
        position = index.at_boundary(index.boundaries - 1)
        return (
            f"{index.path}: the last document boundary (byte {position:,}) is {previous:,}, but"
            f" there are {index.sequences:,} sequences"
        )
    return None


def _sequence_problem(index: IdxFile) -> str | None:
    """Check that the sequences fill the .bin from byte 0 on, without gaps or overlaps."""
    import numpy

    end = 0
    arrays = (index.at_length(0), "<i4"), (index.at_offset(0), "<i8")
    for first, (lengths, offsets) in _blocks(index, index.sequences, *arrays):
        ends = end + numpy.cumsum(lengths * numpy.int64(index.token_bytes))
        begins = numpy.concatenate(([end], ends[:-1]))
        wrong = (lengths < 0) | (offsets != begins) | (ends > index.bin_bytes)
        if wrong.any():
            i = int(wrong.argmax())
            values = (int(array[i]) for array in (lengths, offsets, begins, ends))
            return _sequence_message(index, first + i, *values)
        end = int(ends[-1])
    return None


def _sequence_message(
    index: IdxFile, sequence: int, length: int, offset: int, begin: int, end: int
) -> str:
    """Return what is wrong with a sequence of `length` tokens at `offset`; `begin` is correct."""
    name = f"{index.path}: sequence {sequence:,} of document {index.document(sequence):,}"
    of_bin = f"of the {index.bin_bytes:,} bytes of {index.path.with_suffix('.bin')}"
    length_at = f"byte {index.at_length(sequence):,}"
    if length < 0:
        return f"{name} has {length:,} tokens ({length_at}); the minimum is 0"
    if offset != begin:
        expected = f"the one before it ends at {begin:,}" if sequence else "the first begins at 0"
        return (
            f"{name} begins at byte {offset:,} {of_bin} (byte {index.at_offset(sequence):,}),"
            f" but {expected}"
        )
    return f"{name} has {length:,} tokens ({length_at}) and so ends at byte {end:,} {of_bin}"


def _blocks(index: IdxFile, count: int, *arrays: tuple[int, str]):
    """Yield (number of the first entry, one block per array); arrays are (byte of the .idx, dtype).

    Reads instead of mapping: a file truncated meanwhile gives a short block, and no SIGBUS.
    """
    import numpy

    with open(index.path, "rb") as stream:
        for first in range(0, count, BLOCK):
            blocks = []
            for position, dtype in arrays:
                stream.seek(position + first * numpy.dtype(dtype).itemsize)
                blocks.append(numpy.fromfile(stream, dtype, min(BLOCK, count - first)))
            if any(len(block) < min(BLOCK, count - first) for block in blocks):
                raise UserError(
                    f"{index.path}: the file was truncated while it was read; is it still being"
                    " written?"
                )
            yield first, blocks
