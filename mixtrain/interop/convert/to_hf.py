"""Export a Megatron-Core checkpoint of any run and layout to a directory for transformers and vLLM.

Rule: tensors are read and written in blocks of BLOCK bytes, so memory does not grow with the model.
A configuration that transformers would compute differently is refused before anything is written.
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
from mixtrain.checkpoint.state import state_of
from mixtrain.checkpoint.tensor_reader import TensorReader
from mixtrain.config.schema import Config
from mixtrain.data.tokenizer import TOKENIZER, copy_tokenizer, no_tokenizer_message, tokenizer_files
from mixtrain.errors import UserError
from mixtrain.interop.convert import flat_ranges, hf_source
from mixtrain.interop.convert.checkpoint_config import (
    Hashes,
    checkpoint_at,
    config_of,
    tokenizer_of,
)
from mixtrain.interop.convert.dtype_cast import DtypeCast, warn_nonfinite
from mixtrain.interop.convert.flat_ranges import RangeIndex
from mixtrain.interop.convert.hf_config import to_hugging_face
from mixtrain.interop.convert.hf_files import CONFIG, INDEX, NAMES, SINGLE
from mixtrain.interop.convert.output_directory import write_text, written_whole
from mixtrain.interop.convert.weights import check_tensors
from mixtrain.interop.convert.workers import Advance, run_jobs, split_evenly
from mixtrain.system.links import directory_in

BLOCK = 1 << 26  # bytes


class SafetensorsFile(NamedTuple):
    """A file to write."""

    path: Path
    names: tuple[str, ...]
    size: int  # bytes of its tensors


class MegatronReader(NamedTuple):
    """Read Hugging Face tensors from a Megatron checkpoint."""

    parts: TensorReader | None  # None: only headers are written
    index: RangeIndex
    cast: DtypeCast

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor in order, in contiguous blocks of at most BLOCK bytes."""
        most = BLOCK // self.cast.dtype.itemsize
        for run in self.index.by_name[name]:
            start = run.megatron_start
            end = start + run.count
            while start < end:
                stop = min(end, self.parts.contiguous_stop(run.key, start, most))
                yield self.cast(name, self.parts.flat(run.key, start, stop))
                start = stop

    def size(self, name: str) -> int:
        """Return the bytes of the tensor in the output dtype."""
        return math.prod(self.index.hf_shapes[name]) * self.cast.dtype.itemsize


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
    """Write a checkpoint, or the newest one in `ckpt_dir`, as a Hugging Face model.

    Returns the checkpoint's path.

    Everything is checked before anything is written, except the contents of the weights' files:
    their SHA-256 (with `verify`) and NaN or infinity are checked while copying. UserError with
    everything that is wrong, Fault if the disk is full; then there is no out_dir.
    """
    checkpoint = checkpoint_at(ckpt_dir)
    run_state = state_of(checkpoint)
    config = config_of(checkpoint)
    config_json = to_hugging_face(config)
    parts = TensorReader(checkpoint)
    tokenizer = _find_tokenizer(tokenizer, checkpoint, config, allow_other_tokenizer)
    vocab_size = hf_source.unpadded_vocab_size(run_state, config, tokenizer)
    index = flat_ranges.build_index(config, layout, vocab_size)
    reader = _reader(parts, index, dtype, allow_nonfinite)
    passthrough, generation_config = hf_source.to_export(run_state, config, tokenizer)
    dtype_name = str(reader.cast.dtype).removeprefix("torch.")
    config_json |= passthrough | {"vocab_size": vocab_size}
    config_json |= {"torch_dtype": dtype_name, "dtype": dtype_name}  # transformers 4, 5
    size = sum(map(reader.size, index.hf_shapes))
    hashes = Hashes(checkpoint, parts.files(index.megatron_shapes)) if verify else None
    with written_whole(out_dir, size, len(index.hf_shapes)) as out:
        files = plan_files(out, reader, max_shard_size)
        jobs = [
            partial(_write_files, share, reader)
            for share in split_evenly(files, processes, lambda file: file.size)
        ]
        hash_jobs = hashes.jobs(processes) if hashes else []
        work = size + (hashes.size if hashes else 0)
        nonfinite = run_jobs("to Hugging Face", jobs, work, background=hash_jobs)
        if len(files) > 1:
            write_weight_map(out / INDEX, files, reader)
        if tokenizer:
            copy_tokenizer(tokenizer, out)
        for name, content in ((CONFIG, config_json), (hf_source.GENERATION, generation_config)):
            if content is not None:
                write_text(out / name, json.dumps(content, indent=2) + "\n")
    warn_nonfinite(set().union(*nonfinite))
    return checkpoint


def _find_tokenizer(
    given: Path | None, checkpoint: Path, config: Config, allow_other: bool
) -> Path | None:
    """Return the tokenizer to export. UserError, before anything is written, if it is unusable."""
    tokenizer = given or tokenizer_of(checkpoint, config)
    if tokenizer and not tokenizer_files(tokenizer) and given:
        raise UserError(f"--tokenizer {no_tokenizer_message(given)}")
    if given and not allow_other:
        beside = None
        with suppress(UserError):  # a link to another place is not followed
            beside = directory_in(checkpoint.resolve().parent, TOKENIZER)
        refuse_other(given, beside, checkpoint)
    return tokenizer


def _reader(
    parts: TensorReader, index: RangeIndex, dtype: torch.dtype | None, allow_nonfinite: bool
) -> MegatronReader:
    """Return a reader. UserError if the checkpoint's tensors are not those of its configuration."""
    stored = {
        key: torch.empty(shape, dtype=parts.dtypes[key], device="meta")
        for key, shape in parts.shapes.items()
        if not key.startswith("optimizer.")
    }
    try:
        check_tensors(index.megatron_shapes, stored, NAMES, mixed=dtype is not None)
    except UserError as error:
        raise UserError(*(f"{parts.directory}: {problem}" for problem in error.problems)) from None
    dtype = dtype or next(iter(stored.values())).dtype
    return MegatronReader(parts, index, DtypeCast(dtype, allow_nonfinite))


def plan_files(out: Path, reader: MegatronReader, max_size: int) -> list[SafetensorsFile]:
    """Split the tensors, in order, into files of at most `max_size` bytes or of one tensor."""
    groups: list[list[str]] = [[]]
    room = max_size
    for name in reader.index.hf_shapes:
        size = reader.size(name)
        if size > room and groups[-1]:
            groups.append([])
            room = max_size
        groups[-1].append(name)
        room -= size
    total = len(groups)
    file_names = [SINGLE]
    if total > 1:
        file_names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    return [
        SafetensorsFile(out / file_name, tuple(names), sum(map(reader.size, names)))
        for file_name, names in zip(file_names, groups, strict=True)
    ]


def _write_files(
    files: list[SafetensorsFile], reader: MegatronReader, advance: Advance
) -> set[str]:
    """Write files; return the names of tensors with NaN or infinity, where these are allowed."""
    for file in files:
        try:
            with open(file.path, "wb", buffering=0) as stream:
                _write_all(stream, header(file, reader))
                for name in file.names:
                    for block in reader.blocks(name):
                        _write_all(stream, block.contiguous().view(torch.uint8).numpy())
                        advance(block.nbytes)
                os.fsync(stream.fileno())
        except OSError as error:
            error.filename = error.filename or str(
                file.path
            )  # a write error does not name the file
            raise
    return reader.cast.nonfinite


def header(file: SafetensorsFile, reader: MegatronReader) -> bytes:
    """Return the start of a safetensors file: the header's length, and the header.

    The header is padded to a multiple of 8 bytes.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in file.names:
        start = end
        end += reader.size(name)
        entries[name] = {
            "dtype": NAMES[reader.cast.dtype],
            "shape": list(reader.index.hf_shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_all(stream, data) -> None:
    view = memoryview(data).cast("B")
    while view:  # an unbuffered write may write only a part
        view = view[stream.write(view) :]


def write_weight_map(path: Path, files: list[SafetensorsFile], reader: MegatronReader) -> None:
    """Write model.safetensors.index.json."""
    total = sum(math.prod(shape) for shape in reader.index.hf_shapes.values())
    metadata = {"total_parameters": total, "total_size": total * reader.cast.dtype.itemsize}
    weight_map = {name: file.path.name for file in files for name in file.names}
    write_text(path, json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")
