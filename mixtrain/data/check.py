"""What is wrong with the data a configuration names, found before torch is imported.

The rule it keeps: nothing heavy on import, and no token is read; every problem found is reported,
and each names the file or key and both numbers. Sizes, headers and JSON take milliseconds, every
entry of an index seconds for 10^8.
"""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import NotRequired, TypedDict

from mixtrain.config.data_blend import duplicate_problems, parse_blend, split_ranges, split_weights
from mixtrain.data.index import Index, entries_problem, read_index
from mixtrain.data.tokenizer import (
    instead,
    tokenizer_eod_id,
    tokenizer_files,
    tokenizer_sha256,
    tokenizer_vocab_size,
)
from mixtrain.errors import UserError
from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import Count, InvalidJson, Name

SPLITS = ("train", "valid", "test")


class Facts(TypedDict):
    """PREFIX.json, as far as it is compared."""

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
    """Every problem with the indexed data and its tokenizer, one sentence each; an empty list where there is none.

    `split`, `samples` (train, valid, test; as many as the run will ask for) and `seq_length` (tokens) are checked
    against the documents where they are given. `every_entry`: of the index files, not the last one alone.
    """
    try:
        prefixes, _ = parse_blend(data_path)
    except UserError as error:
        return [*error.problems, *_tokenizer_problems(tokenizer_dir, vocab_size)]
    problems = list(duplicate_problems({prefix: _file_of(prefix) for prefix in prefixes}, prefixes))
    for prefix in prefixes:
        problems += _index_problems(prefix, split, samples or (1, 0, 0), seq_length, every_entry)
        problems += _sidecar_problems(prefix, tokenizer_dir, vocab_size)
    return problems + _tokenizer_problems(tokenizer_dir, vocab_size)


def _index_problems(
    prefix: str, split: str | None, samples, seq_length: int, every_entry: bool
) -> list[str]:
    """What is wrong with the index, or, where nothing is, with how the split cuts its documents."""
    try:
        index = read_index(prefix)
        if every_entry and (problem := entries_problem(index)):
            return [problem]
        return [] if split is None else _split_problems(prefix, index, split, samples, seq_length)
    except UserError as error:
        return list(error.problems)
    except OSError as error:
        return [f"{prefix}.idx: cannot be read: {error.strerror or error}"]


def _file_of(prefix: str) -> Hashable:
    """The file that holds a prefix's tokens, whatever leads to it; the prefix itself where there is none."""
    try:
        found = os.stat(f"{prefix}.bin")
    except OSError:
        return prefix
    return found.st_dev, found.st_ino


def _split_problems(prefix: str, index: Index, split: str, samples, seq_length: int) -> list[str]:
    """Parts that samples are wanted of and that are shorter than one: Megatron would fill each by reading them again.

    A sample is seq_length tokens and the one that the last of them predicts. Of no token Megatron adds epochs for ever.
    """
    return [
        f'data.split = "{split}" gives {name} {tokens or "no"} token{"s" * (tokens > 1)} of {prefix} ({end - begin} of '
        f"its {index.sequences} {index.parts}), but {wanted} samples are wanted, and one takes data.seq_length + 1 = "
        f"{seq_length + 1}; give it a larger share, as in data.split='90,5,5', or {_without(name, split)}"
        for name, (begin, end), wanted in zip(
            SPLITS, split_ranges(index.sequences, split), samples, strict=True
        )
        if wanted
        and (tokens := (index.offset(end) - index.offset(begin)) // index.token_bytes) <= seq_length
    ]


def _without(name: str, split: str) -> str:
    """How a run asks for no sample of a part."""
    train, valid, _ = split_weights(split)
    none = {"valid": "trainer.limit_val_batches=0", "test": f"data.split='{train:g},{valid:g},0'"}
    return none.get(name, "more text")


def _sidecar_problems(prefix: str, tokenizer_dir: Path | None, vocab_size: int) -> list[str]:
    """What preprocess.py noted about the data, where it did (data of Megatron's own tool has no such file)."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return []
    try:
        facts = untrusted_json.read(path, Facts)
    except InvalidJson as error:
        return [f"{error}; it is not a description written by tools/preprocess_data.py"]
    highest = facts["max_token_id"]
    sha256 = facts["tokenizer_sha256"]
    problems = []
    if highest >= vocab_size:
        problems.append(
            f"{path}: the data holds token id {highest}, but model.vocab_size = {vocab_size}; "
            f"use at least {highest + 1}"
        )
    if tokenizer_dir is not None and (Path(tokenizer_dir) / "tokenizer.json").is_file():
        if tokenizer_sha256(tokenizer_dir) != sha256:
            problems.append(
                f"{path}: the data was made by another tokenizer ({facts.get('tokenizer')}, sha256"
                f" {sha256[:12]}) than data.tokenizer = {tokenizer_dir} (sha256"
                f" {tokenizer_sha256(tokenizer_dir)[:12]})"
            )
    return problems


def _tokenizer_problems(tokenizer_dir: Path | None, vocab_size: int) -> list[str]:
    if tokenizer_dir is None:
        return [
            "data.tokenizer is not set; give the tokenizer directory that the data was made with"
        ]
    if not Path(tokenizer_dir).is_dir():
        return [f"data.tokenizer = {instead(Path(tokenizer_dir))}"]
    try:
        size = tokenizer_vocab_size(tokenizer_dir)
        tokenizer_eod_id(tokenizer_dir)
        tokenizer_files(tokenizer_dir)  # they are copied to the checkpoints
    except UserError as error:
        return [f"data.tokenizer: {problem}" for problem in error.problems]
    if size > vocab_size:
        return [
            f"data.tokenizer = {tokenizer_dir} has {size} tokens, more than model.vocab_size ="
            f" {vocab_size}; use at least {size}"
        ]
    return []
