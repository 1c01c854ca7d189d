"""From a Megatron-Core checkpoint, whatever run and layout wrote it, to a directory that transformers and vLLM open.

Rule: a tensor is written as it is read, in blocks of BLOCK bytes, so that memory does not grow with the model; and what
transformers' model would compute differently is refused by its key before anything is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mixtrain.checkpoint.same_tokenizer import refuse_other
from mixtrain.checkpoint.tensor_reader import TensorReader
from mixtrain.config.schema import Config
from mixtrain.data.tokenizer import TOKENIZER, copy_tokenizer, instead, tokenizer_files
from mixtrain.errors import UserError
from mixtrain.interop.convert import hf_source, spans
from mixtrain.interop.convert.casting import Casting, warn
from mixtrain.interop.convert.hf_files import CONFIG, INDEX, NAMES, SINGLE
from mixtrain.interop.convert.output import Advance, dealt, in_processes, write_text, written_whole
from mixtrain.interop.convert.settings import to_hugging_face
from mixtrain.interop.convert.source_config import (
    Hashes,
    checkpoint_at,
    config_of,
    state_of,
    tokenizer_of,
)
from mixtrain.interop.convert.spans import Index
from mixtrain.interop.convert.weights import check
from mixtrain.system.links import directory_in

BLOCK = 1 << 26  # bytes


class Shard(NamedTuple):
    """A file of tensors."""

    path: Path
    names: tuple[str, ...]
    size: int  # bytes of its tensors


class Origin(NamedTuple):
    """Megatron's tensors, to be read by the places of Hugging Face's."""

    parts: TensorReader
    index: Index
    cast: Casting  # to the dtype to give them in

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The elements of a tensor in their order, as they lie together, in blocks of at most BLOCK bytes."""
        most = BLOCK // self.cast.dtype.itemsize
        for run in self.index.by_name[name]:
            at = run.place
            end = run.place + run.count
            while at < end:
                stop = min(end, self.parts.contiguous_stop(run.key, at, most))
                yield self.cast(name, self.parts.flat(run.key, at, stop))
                at = stop

    def size(self, name: str) -> int:
        """Bytes of the tensor as it is written."""
        return math.prod(self.index.names[name]) * self.cast.dtype.itemsize


def convert(
    ckpt_dir: Path,
    out_dir: Path,
    layout: str = "hub",
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    tokenizer: Path | None = None,
    allow_other_tokenizer: bool = False,
    processes: int = 1,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> Path:
    """Write the newest checkpoint of ckpt_dir (or itself) as a Hugging Face model; which checkpoint it was.

    All is checked before anything is written, but for what the files hold: with `verify` their SHA-256, always that
    weights are numbers. UserError with everything that is wrong, a Fault if the disk is full: then there is no out_dir.
    """
    checkpoint = checkpoint_at(ckpt_dir)
    run = state_of(checkpoint)
    config = config_of(checkpoint)
    values = to_hugging_face(config)
    parts = TensorReader(checkpoint)
    tokenizer = _tokenizer(tokenizer, checkpoint, config, allow_other_tokenizer)
    vocabulary = hf_source.rows(run, config, tokenizer)
    origin = _origin(parts, spans.index(config, layout, vocabulary), dtype, allow_nonfinite)
    beside, generation = hf_source.to_export(run, config, tokenizer)
    values |= beside | {"vocab_size": vocabulary}
    written = str(origin.cast.dtype).removeprefix("torch.")
    values |= {"torch_dtype": written, "dtype": written}  # transformers 4, transformers 5
    size = sum(map(origin.size, origin.index.names))
    hashes = Hashes(checkpoint, parts.files(origin.index.shapes)) if verify else None
    with written_whole(out_dir, size, len(origin.index.names)) as out:
        shards = shards_of(out, origin, max_shard_size)
        jobs = [
            partial(_write_shards, share, origin)
            for share in dealt(shards, processes, lambda shard: shard.size)
        ]
        beside = hashes.jobs(processes) if hashes else []
        found = in_processes("to Hugging Face", jobs, size + (hashes.size if hashes else 0), beside)
        if len(shards) > 1:
            write_weight_map(out / INDEX, shards, origin)
        if tokenizer:
            copy_tokenizer(tokenizer, out)
        for name, content in ((CONFIG, values), (hf_source.GENERATION, generation)):
            if content is not None:
                write_text(out / name, json.dumps(content, indent=2) + "\n")
    warn(set().union(*found))
    return checkpoint


def _tokenizer(
    given: Path | None, checkpoint: Path, config: Config, allow_other: bool
) -> Path | None:
    """The tokenizer that goes with the model. What is wrong with its files is said before anything is copied."""
    found = given or tokenizer_of(checkpoint, config)
    if found and not tokenizer_files(found) and given:
        raise UserError(f"--tokenizer {instead(given)}")
    if given and not allow_other:
        own = None
        with suppress(UserError):  # a link to another place, which is not followed
            own = directory_in(checkpoint.resolve().parent, TOKENIZER)
        refuse_other(given, own, checkpoint)
    return found


def _origin(
    parts: TensorReader, index: Index, dtype: torch.dtype | None, allow_nonfinite: bool
) -> Origin:
    """The tensors of a checkpoint's model, which must be those of its configuration."""
    stored = {
        key: torch.empty(shape, dtype=parts.dtypes[key], device="meta")
        for key, shape in parts.shapes.items()
        if not key.startswith("optimizer.")
    }
    try:
        check(index.shapes, stored, NAMES, mixed=dtype is not None)
    except UserError as error:
        raise UserError(*(f"{parts.directory}: {problem}" for problem in error.problems)) from None
    return Origin(
        parts, index, Casting(dtype or next(iter(stored.values())).dtype, allow_nonfinite)
    )


def shards_of(out: Path, origin: Origin, most: int) -> list[Shard]:
    """The tensors in their order, in files of at most `most` bytes (but one tensor at least)."""
    groups: list[list[str]] = [[]]
    room = most
    for name in origin.index.names:
        if origin.size(name) > room and groups[-1]:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= origin.size(name)
    names = [SINGLE] if len(groups) == 1 else [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
    ]  # fmt: skip
    return [
        Shard(out / name, tuple(group), sum(map(origin.size, group)))
        for name, group in zip(names, groups, strict=True)
    ]  # fmt: skip


def _write_shards(shards: list[Shard], origin: Origin, advance: Advance) -> set[str]:
    """Write some of the files; the tensors in which NaN or infinite numbers were allowed."""
    for shard in shards:
        try:
            with open(shard.path, "wb", buffering=0) as file:
                _write_all(file, header(shard, origin))
                for block in (block for name in shard.names for block in origin.blocks(name)):
                    _write_all(file, block.contiguous().view(torch.uint8).numpy())
                    advance(block.nbytes)
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(shard.path)  # a failing write does not say
            raise
    return origin.cast.nonfinite


def header(shard: Shard, origin: Origin) -> bytes:
    """The beginning of a safetensors file: the length of its header, and the header, padded to 8 bytes."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in shard.names:
        begin = end
        end = end + origin.size(name)
        entries[name] = {
            "dtype": NAMES[origin.cast.dtype],
            "shape": list(origin.index.names[name]),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_all(file, data) -> None:
    view = memoryview(data).cast("B")
    while view:  # an unbuffered file may take a part
        view = view[file.write(view) :]


def write_weight_map(path: Path, shards: list[Shard], origin: Origin) -> None:
    total = sum(math.prod(shape) for shape in origin.index.names.values())
    metadata = {"total_parameters": total, "total_size": total * origin.cast.dtype.itemsize}
    weight_map = {name: shard.path.name for shard in shards for name in shard.names}
    write_text(path, json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")
