"""Checks of the data files that a configuration names, before torch is imported.

Rule: importing this module imports nothing heavy, and no token is read. Every problem found is
reported, with the file or key and both numbers. Sizes, headers and JSON take milliseconds; checking
every entry of an index takes seconds for 10^8 entries.
"""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import NotRequired, TypedDict

from mixtrain.config.data_blend import duplicate_problems, parse_blend, split_ranges, split_weights
from mixtrain.data.index import IdxFile, entries_problem, read_index
from mixtrain.data.tokenizer import (
    no_tokenizer_message,
    tokenizer_eod_id,
    tokenizer_files,
    tokenizer_sha256,
    tokenizer_vocab_size,
)
from mixtrain.errors import UserError
from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import Count, InvalidJson, Name

SPLITS = ("train", "valid", "test")


class DataDescription(TypedDict):
    """The keys of PREFIX.json that are compared."""

    max_token_id: Count
    tokenizer_sha256: Name
    tokenizer: NotRequired[Name | None]


def check_files(
    data_path: list[str],
    tokenizer_dir: Path | None,
    vocab_size: int,
    split: str | None = None,
    samples: tuple[int, int, int] | None = None,
    *,
    seq_length: int = 1,
    every_entry: bool = False,
) -> list[str]:
    """Return every problem of the indexed data and its tokenizer, one sentence each.

    If `split` is given, checks that each split is long enough for `samples` (train, valid, test:
    the samples that the run needs) of `seq_length` tokens. `every_entry` checks all entries of the
    index files, not only the last one.
    """
    try:
        prefixes, _ = parse_blend(data_path)
    except UserError as error:
        return [*error.problems, *_tokenizer_problems(tokenizer_dir, vocab_size)]
    problems = list(duplicate_problems({prefix: _file_id(prefix) for prefix in prefixes}, prefixes))
    for prefix in prefixes:
        problems += _index_problems(prefix, split, samples or (1, 0, 0), seq_length, every_entry)
        problems += _description_problems(prefix, tokenizer_dir, vocab_size)
    return problems + _tokenizer_problems(tokenizer_dir, vocab_size)


def _index_problems(
    prefix: str, split: str | None, samples, seq_length: int, every_entry: bool
) -> list[str]:
    """Return the problems of the index; if it has none, those of the split."""
    try:
        index = read_index(prefix)
        if every_entry and (problem := entries_problem(index)):
            return [problem]
        return [] if split is None else _split_problems(prefix, index, split, samples, seq_length)
    except UserError as error:
        return list(error.problems)
    except OSError as error:
        return [f"{prefix}.idx: cannot be read: {error.strerror or error}"]


def _file_id(prefix: str) -> Hashable:
    """Return device and inode of the .bin of a prefix (links resolved), or the prefix if none."""
    try:
        status = os.stat(f"{prefix}.bin")
    except OSError:
        return prefix
    return status.st_dev, status.st_ino


def _split_problems(prefix: str, index: IdxFile, split: str, samples, seq_length: int) -> list[str]:
    """Return a problem for each split that needs samples and is shorter than one sample.

    A sample is seq_length + 1 tokens: each of seq_length tokens predicts the next one. Megatron
    would repeat a shorter split to fill a sample, and with no token would add epochs forever.
    """
    problems = []
    ranges = split_ranges(index.sequences, split)
    for name, (begin, end), needed in zip(SPLITS, ranges, samples, strict=True):
        tokens = (index.offset(end) - index.offset(begin)) // index.token_bytes if needed else 0
        if needed and tokens <= seq_length:
            problems.append(
                f'data.split = "{split}" gives {name} {tokens or "no"} token{"s" * (tokens > 1)}'
                f" of {prefix} ({end - begin} of its {index.sequences} {index.entry_kind}), but"
                f" {needed} samples are wanted, and one takes data.seq_length + 1 ="
                f" {seq_length + 1}; give it a larger share, as in data.split='90,5,5', or"
                f" {_alternative(name, split)}"
            )
    return problems


def _alternative(name: str, split: str) -> str:
    """Return the setting with which a run needs no sample of the split; for train, "more text"."""
    train, valid, _ = split_weights(split)
    settings = {
        "valid": "trainer.limit_val_batches=0",
        "test": f"data.split='{train:g},{valid:g},0'",
    }
    return settings.get(name, "more text")


def _description_problems(prefix: str, tokenizer_dir: Path | None, vocab_size: int) -> list[str]:
    """Check PREFIX.json, which preprocess.py writes; data of Megatron's own tool has none."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return []
    try:
        description = untrusted_json.read(path, DataDescription)
    except InvalidJson as error:
        return [f"{error}; it is not a description written by tools/preprocess_data.py"]
    highest = description["max_token_id"]
    sha256 = description["tokenizer_sha256"]
    problems = []
    if highest >= vocab_size:
        problems.append(
            f"{path}: the data holds token id {highest}, but model.vocab_size = {vocab_size}; "
            f"use at least {highest + 1}"
        )
    if tokenizer_dir is not None and (Path(tokenizer_dir) / "tokenizer.json").is_file():
        if tokenizer_sha256(tokenizer_dir) != sha256:
            problems.append(
                f"{path}: the data was made by another tokenizer ({description.get('tokenizer')},"
                f" sha256 {sha256[:12]}) than data.tokenizer = {tokenizer_dir} (sha256"
                f" {tokenizer_sha256(tokenizer_dir)[:12]})"
            )
    return problems


def _tokenizer_problems(tokenizer_dir: Path | None, vocab_size: int) -> list[str]:
    if tokenizer_dir is None:
        return [
            "data.tokenizer is not set; give the tokenizer directory that the data was made with"
        ]
    if not Path(tokenizer_dir).is_dir():
        return [f"data.tokenizer = {no_tokenizer_message(Path(tokenizer_dir))}"]
    try:
        size = tokenizer_vocab_size(tokenizer_dir)
        tokenizer_eod_id(tokenizer_dir)
        tokenizer_files(tokenizer_dir)  # a run copies them beside its checkpoints
    except UserError as error:
        return [f"data.tokenizer: {problem}" for problem in error.problems]
    if size > vocab_size:
        return [
            f"data.tokenizer = {tokenizer_dir} has {size} tokens, more than model.vocab_size ="
            f" {vocab_size}; use at least {size}"
        ]
    return []
