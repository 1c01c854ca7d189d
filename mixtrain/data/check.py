"""What is wrong with the data a configuration names, found before torch is imported.

The rule it keeps: nothing heavy on import, and no token is read; every problem found is reported, and each names the
file or key and both numbers. Sizes, headers and JSON take milliseconds, every entry of an index seconds for 10^8.
"""

import math
import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from mixtrain import untrusted_json
from mixtrain.data.index import Index, entries_problem, read_index
from mixtrain.data.tokenizer import instead, tokenizer_eod_id, tokenizer_files, tokenizer_sha256, tokenizer_vocab_size
from mixtrain.errors import UserError
from mixtrain.untrusted_json import Count, InvalidJson, Name

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
    problems = list(named_twice({prefix: _file_of(prefix) for prefix in prefixes}, prefixes))
    for prefix in prefixes:
        problems += _index_problems(prefix, split, samples or (1, 0, 0), seq_length, every_entry)
        problems += _sidecar_problems(prefix, tokenizer_dir, vocab_size)
    return problems + _tokenizer_problems(tokenizer_dir, vocab_size)


def _index_problems(prefix: str, split: str | None, samples, seq_length: int, every_entry: bool) -> list[str]:
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


def named_twice(data: dict[str, Hashable], prefixes: list[str]) -> Iterator[str]:
    """What is wrong where two of the prefixes stand for the same data, by what each stands for."""
    first: dict[Hashable, str] = {}
    for prefix in prefixes:
        if (before := first.get(data[prefix])) is not None:
            yield (
                f"data.data_path has {before} and {prefix}, which are the same data: its samples would be trained on"
                " twice; leave one out, and give weights where one is to be read more often"
            )
        first.setdefault(data[prefix], prefix)


def _file_of(prefix: str) -> Hashable:
    """The file that holds a prefix's tokens, whatever leads to it; the prefix itself where there is none."""
    try:
        found = os.stat(f"{prefix}.bin")
    except OSError:
        return prefix
    return found.st_dev, found.st_ino


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None


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


def _split_problems(prefix: str, index: Index, split: str, samples, seq_length: int) -> list[str]:
    """Parts that samples are wanted of and that are shorter than one: Megatron would fill each by reading them again.

    A sample is seq_length tokens and the one that the last of them predicts. Of no token Megatron adds epochs for ever.
    """
    return [
        f'data.split = "{split}" gives {name} {tokens or "no"} token{"s" * (tokens > 1)} of {prefix} ({end - begin} of '
        f"its {index.sequences} {index.parts}), but {wanted} samples are wanted, and one takes data.seq_length + 1 = "
        f"{seq_length + 1}; give it a larger share, as in data.split='90,5,5', or {_without(name, split)}"
        for name, (begin, end), wanted in zip(SPLITS, split_ranges(index.sequences, split), samples, strict=True)
        if wanted and (tokens := (index.offset(end) - index.offset(begin)) // index.token_bytes) <= seq_length
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
        return [f"data.tokenizer = {instead(Path(tokenizer_dir))}"]
    try:
        size = tokenizer_vocab_size(tokenizer_dir)
        tokenizer_eod_id(tokenizer_dir)
        tokenizer_files(tokenizer_dir)  # they are copied to the checkpoints
    except UserError as error:
        return [f"data.tokenizer: {problem}" for problem in error.problems]
    if size > vocab_size:
        return [
            f"data.tokenizer = {tokenizer_dir} has {size} tokens, more than model.vocab_size = {vocab_size}; "
            f"use at least {size}"
        ]
    return []
