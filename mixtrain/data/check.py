"""What is wrong with the data a configuration names, found before torch is imported.

The rule it keeps: only file sizes, headers and JSON are read (milliseconds, whatever the size of the data), with the
standard library alone; every problem found is reported, and each names the file or key and both numbers.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from mixtrain import untrusted_json
from mixtrain.data.tokenizer import tokenizer_eod_id, tokenizer_sha256, tokenizer_vocab_size
from mixtrain.errors import UserError
from mixtrain.untrusted_json import Count, InvalidJson, Name

# The .idx layout is that of megatron/core/datasets/indexed_dataset.py: magic, version, dtype code, number of sequences,
# number of document boundaries; then lengths (int32) and byte offsets (int64) of the sequences, and boundaries (int64).
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# fmt: off
BYTES_OF_DTYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # uint8 int8 int16 int32 int64 uint16
# fmt: on
SPLITS = ("train", "valid", "test")


class Facts(TypedDict):
    """PREFIX.json, as far as it is compared."""

    max_token_id: Count
    tokenizer_sha256: Name
    tokenizer: NotRequired[Name | None]


@dataclass(frozen=True)
class Index:
    """What an .idx file says: how many sequences there are, and how many bytes of the .bin they fill."""

    path: Path
    sequences: int
    bin_bytes: int

    def offset(self, sequence: int) -> int:
        """Where the sequence begins in the .bin, in bytes; for the number of sequences, where the last one ends."""
        if sequence == self.sequences:
            return self.bin_bytes
        with open(self.path, "rb") as stream:
            return _read_number(stream, HEADER.size + 4 * self.sequences + 8 * sequence, "<q")


def check_files(
    data_path: list[str],
    tokenizer_dir: Path | None,
    vocab_size: int,
    split: str | None = None,
    samples: tuple[int, int, int] | None = None,
) -> list[str]:
    """Every problem with the indexed data and its tokenizer, one sentence each; an empty list where there is none.

    `split` and `samples` (train, valid, test; as many as the run will ask for) are checked against the number of
    documents where they are given.
    """
    try:
        prefixes, _ = parse_blend(data_path)
    except UserError as error:
        return [*error.problems, *_tokenizer_problems(tokenizer_dir, vocab_size)]
    problems = []
    for prefix in prefixes:
        try:
            index = read_index(prefix)
        except UserError as error:
            problems += error.problems
        else:
            if split is not None:
                problems += _split_problems(prefix, index, split, samples or (1, 0, 0))
        problems += _sidecar_problems(prefix, tokenizer_dir, vocab_size)
    return problems + _tokenizer_problems(tokenizer_dir, vocab_size)


def parse_blend(data_path: list[str]) -> tuple[list[str], list[float] | None]:
    """The prefixes of Megatron's data list and their weights, or None where it names prefixes alone."""
    entries = [str(entry).strip() for entry in data_path or ()]
    if not entries:
        raise UserError('data.data_path is empty; give a prefix, or weights and prefixes: ["0.3", "a", "0.7", "b"]')
    weights = [_number(entry) for entry in entries[::2]]
    if all(weight is None for weight in map(_number, entries)):
        return entries, None
    if len(entries) % 2 or None in weights or any(_number(entry) is not None for entry in entries[1::2]):
        raise UserError(
            f"data.data_path = {entries} mixes weights and prefixes out of step; "
            'give every prefix its weight before it: ["0.3", "a", "0.7", "b"]'
        )
    for weight, prefix in zip(weights, entries[1::2], strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data.data_path: the weight {weight} of {prefix} must be above 0; leave the prefix out")
    return entries[1::2], weights


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None


def read_index(prefix: str) -> Index:
    """What prefix.idx says, checked against the sizes of both files. Raises UserError."""
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [str(path) for path in (bin_, idx) if not path.is_file()]
    if missing:
        without = re.sub(r"\.(bin|idx)$", "", prefix)
        hint = f"; data.data_path takes the prefix {without}" if without != prefix else ""
        raise UserError(f"data.data_path: no file {' and no file '.join(missing)}{hint}")
    idx_bytes = idx.stat().st_size
    with open(idx, "rb") as stream:
        header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{idx}: not a Megatron index, it starts with {header[:9]!r} instead of {MAGIC!r}")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != 1 or code not in BYTES_OF_DTYPE:
            raise UserError(f"{idx}: version {version}, token type {code}; version 1 with whole numbers is read")
        wanted = HEADER.size + 12 * sequences + 8 * documents
        if idx_bytes != wanted:
            raise UserError(f"{idx}: {idx_bytes:,} bytes, but its header ({sequences:,} sequences) makes it {wanted:,}")
        if not sequences:
            raise UserError(f"{idx}: an empty data set, it has no sequence")
        last_length = _read_number(stream, HEADER.size + 4 * (sequences - 1), "<i")
        last_offset = _read_number(stream, HEADER.size + 4 * sequences + 8 * (sequences - 1), "<q")
    bin_bytes = last_offset + last_length * BYTES_OF_DTYPE[code]
    if bin_.stat().st_size != bin_bytes:
        raise UserError(f"{bin_}: {bin_.stat().st_size:,} bytes, but by {idx} it should have {bin_bytes:,}")
    if not bin_bytes:
        raise UserError(f"{bin_}: an empty data set, its {sequences} documents have no token")
    return Index(idx, sequences, bin_bytes)


def _read_number(stream, position: int, layout: str) -> int:
    stream.seek(position)
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))[0]


def split_weights(split: str) -> list[float]:
    """The parts of train, valid and test in "90,5,5". Raises UserError."""
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if len(weights) != 3 or not all(0 <= weight < math.inf for weight in weights) or weights[0] == 0:
        raise UserError(f'data.split = "{split}" must be three numbers, the first above 0, as in "90,5,5"')
    return weights


def split_ranges(documents: int, split: str) -> list[tuple[int, int]]:
    """The documents [begin, end) of train, valid and test, as Megatron's builder cuts them. Raises UserError."""
    weights, ends = split_weights(split), [0.0]
    for weight in weights:
        ends.append(ends[-1] + weight / sum(weights))
    bounds = [int(round(end * float(documents))) for end in ends]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _split_problems(prefix: str, index: Index, split: str, samples: tuple[int, int, int]) -> list[str]:
    """Splits that samples are wanted of and that hold no token: Megatron would add epochs of nothing for ever."""
    try:
        ranges = split_ranges(index.sequences, split)
    except UserError as error:
        return list(error.problems)
    return [
        f'data.split = "{split}" gives {name} no token of {prefix} ({end - begin} of its {index.sequences} documents), '
        f"but {wanted} samples are wanted; give it a larger share, as in data.split='90,5,5', or 0"
        for name, (begin, end), wanted in zip(SPLITS, ranges, samples, strict=True)
        if wanted and index.offset(begin) == index.offset(end)
    ]


def _sidecar_problems(prefix: str, tokenizer_dir: Path | None, vocab_size: int) -> list[str]:
    """What preprocess.py noted about the data, where it did (data of Megatron's own tool has no such file)."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return []
    try:
        facts = untrusted_json.read(path, Facts)
    except InvalidJson as error:
        return [f"{error}; it is not a description written by tools/preprocess_data.py"]
    highest, sha256 = facts["max_token_id"], facts["tokenizer_sha256"]
    problems = []
    if highest >= vocab_size:
        problems.append(
            f"{path}: the data holds token id {highest}, but model.vocab_size = {vocab_size}; "
            f"use at least {highest + 1}"
        )
    if tokenizer_dir is not None and (Path(tokenizer_dir) / "tokenizer.json").is_file():
        if tokenizer_sha256(tokenizer_dir) != sha256:
            problems.append(
                f"{path}: the data was made by another tokenizer ({facts.get('tokenizer')}, sha256 {sha256[:12]}) than "
                f"data.tokenizer = {tokenizer_dir} (sha256 {tokenizer_sha256(tokenizer_dir)[:12]})"
            )
    return problems


def _tokenizer_problems(tokenizer_dir: Path | None, vocab_size: int) -> list[str]:
    if tokenizer_dir is None:
        return ["data.tokenizer is not set; give the tokenizer directory that the data was made with"]
    if not Path(tokenizer_dir).is_dir():
        return [f"data.tokenizer = {tokenizer_dir}: no such directory"]
    try:
        size = tokenizer_vocab_size(tokenizer_dir)
        tokenizer_eod_id(tokenizer_dir)
    except UserError as error:
        return [f"data.tokenizer: {problem}" for problem in error.problems]
    if size > vocab_size:
        return [
            f"data.tokenizer = {tokenizer_dir} has {size} tokens, more than model.vocab_size = {vocab_size}; "
            f"use at least {size}"
        ]
    return []
