"""Import a Hugging Face directory as a Megatron-Core checkpoint that any layout reads.

Rule: the chunks on disk depend on the model only, so both layouts of Hugging Face's files give the
same checkpoint, byte for byte. No chunk is larger than BLOCK, and only a few are in memory.
"""

from __future__ import annotations

import errno
import io
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from mixtrain.checkpoint import directory, shard_writer, state
from mixtrain.checkpoint.index import COMMON, CONFIG, METADATA, write_index
from mixtrain.checkpoint.integrity import describe, write_manifest
from mixtrain.checkpoint.megatron_args import common_of_weights
from mixtrain.checkpoint.shard_writer import Item, WriteOutcome
from mixtrain.checkpoint.state import RunState
from mixtrain.config import tensor_schema
from mixtrain.config.plan import derive
from mixtrain.config.schema import Config
from mixtrain.data.tokenizer import TOKENIZER, copy_tokenizer, tokenizer_files
from mixtrain.interop.convert import flat_ranges, hf_checkpoint, hf_source
from mixtrain.interop.convert.checkpoint_config import configuration, untrained_state
from mixtrain.interop.convert.dtype_cast import DTYPES, DtypeCast, warn_nonfinite
from mixtrain.interop.convert.flat_ranges import RangeIndex
from mixtrain.interop.convert.hf_files import StoredTensor
from mixtrain.interop.convert.output_directory import written_whole
from mixtrain.interop.convert.vocab_padding import VocabPadding, padded_size
from mixtrain.interop.convert.weights import check_exportable, check_tensors, layout_of
from mixtrain.interop.convert.workers import Advance, run_jobs, split_evenly

BLOCK = 1 << 26  # bytes of a chunk, at most


class ChunkToWrite(NamedTuple):
    """A chunk of a Megatron tensor; its elements are contiguous in the flattened tensor."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int  # in the flattened tensor
    stop: int

    def numel(self) -> int:
        return self.stop - self.start


def convert(
    hf_dir: Path,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    processes: int = 1,
    allow_nonfinite: bool = False,
    divisible_by: int = 1,
) -> Config:
    """Write a Hugging Face model as a checkpoint, out_dir/release, with its tokenizer beside it.

    Returns the model's Config. `divisible_by`: pad the vocabulary to a multiple. Everything except
    NaN, infinity and overflow is checked before anything is written. UserError with everything that
    is wrong, Fault if the disk is full; then there is no out_dir.
    """
    source = hf_checkpoint.read(hf_dir)
    tensors = source.tensors
    hf_vocab_size = source.overrides["model.vocab_size"]
    padded = {"model.vocab_size": padded_size(hf_vocab_size, divisible_by)}
    config = configuration(source.overrides | padded)
    check_exportable(config)
    index = flat_ranges.build_index(config, layout_of(config, tensors), hf_vocab_size)
    check_tensors(index.hf_shapes, tensors, DTYPES.values(), mixed=dtype is not None)
    dtype = dtype or next(iter(tensors.values())).dtype
    tokenizer_files(hf_dir)  # refuses bad files before anything is written
    shapes = index.megatron_shapes
    chunks = [chunk for key in shapes for chunk in chunks_of(key, shapes[key], dtype)]
    size = sum(map(ChunkToWrite.numel, chunks)) * dtype.itemsize
    padding = VocabPadding(derive(config), hf_vocab_size)
    reader = HfReader(tensors, index, DtypeCast(dtype, allow_nonfinite), padding)
    kept = hf_source.of_directory(hf_dir, source.config_json, hf_vocab_size)
    run_state = untrained_state(config, kept)
    for note in [*source.notes, *padding.notes()]:
        print(note, file=sys.stderr)
    objects = dict(_extra_states(index))
    with written_whole(out_dir, size, len(chunks) + len(objects)) as out:
        release = out / directory.RELEASE
        release.mkdir()
        nonfinite = _write(release, run_state, reader, chunks, objects, processes)
        copy_tokenizer(hf_dir, out / TOKENIZER)
        directory.write_atomically(out / directory.TRACKER, f"{directory.RELEASE}\n")
    warn_nonfinite(nonfinite)
    return config


class HfReader(NamedTuple):
    """Read chunks of Megatron tensors from Hugging Face's files."""

    tensors: dict[str, StoredTensor]
    index: RangeIndex
    cast: DtypeCast
    padding: VocabPadding

    def read(self, chunk: ChunkToWrite) -> torch.Tensor:
        """Return a chunk: mapped from a file where it is contiguous there, else a copy."""
        overlaps = flat_ranges.overlapping(
            self.index.by_key[chunk.key], chunk.start, chunk.stop, flat_ranges.MEGATRON_START
        )
        blocks = []
        for run, low, high in overlaps:
            block = self.tensors[run.name].read(run.hf_start + low, run.hf_start + high)
            blocks.append(self.cast(run.name, block))
        if missing := chunk.numel() - sum(block.numel() for block in blocks):
            padding = self.padding.elements(chunk.key, chunk.stop - missing, chunk.stop)
            blocks.append(padding.to(self.cast.dtype))
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).view(chunk.size)


def chunks_of(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[ChunkToWrite]:
    """Yield a tensor's chunks: one for each layer and expert, split by rows if above BLOCK."""
    axes = tensor_schema.stacked_axes(key)
    rows = shape[axes]
    row_shape = shape[axes + 1 :]
    row_numel = math.prod(row_shape)
    chunks_per_matrix = -(-rows * row_numel * dtype.itemsize // BLOCK)
    step = -(-rows // chunks_per_matrix)
    for number, stack_index in enumerate(product(*map(range, shape[:axes]))):
        for first in range(0, rows, step):
            count = min(step, rows - first)
            start = (number * rows + first) * row_numel
            offset = (*stack_index, first, *(0 for _ in row_shape))
            size = (*(1 for _ in stack_index), count, *row_shape)
            yield ChunkToWrite(key, offset, size, start, start + count * row_numel)


def _write(
    release: Path,
    run_state: RunState,
    reader: HfReader,
    chunks: list[ChunkToWrite],
    objects: dict[str, Item],
    processes: int,
) -> set[str]:
    """Write the chunks, the index, and at last the manifest, which completes a checkpoint.

    Returns the names of tensors with NaN or infinity, where these are allowed. OSError if something
    could not be written.
    """
    files = split_evenly(chunks, processes * shard_writer.FILES_PER_RANK, ChunkToWrite.numel)
    jobs = []
    for rank in range(processes):
        first = rank * shard_writer.FILES_PER_RANK
        jobs.append(
            partial(
                _write_files,
                release,
                rank,
                files[first : first + shard_writer.FILES_PER_RANK],
                reader,
            )
        )
    size = sum(map(ChunkToWrite.numel, chunks)) * reader.cast.dtype.itemsize
    results = run_jobs("to Megatron-Core", jobs, size)
    written = [share for share, _ in results]
    written.append(shard_writer.write_shards(release, processes, list(objects.values())))
    if failed := next((share for share in written if share.error), None):
        raise OSError(failed.errno or errno.EIO, failed.error)
    small_files = [release / name for name in (COMMON, state.NAME, METADATA, CONFIG)]
    # torch.save to a full disk does not raise the disk's OSError
    common = io.BytesIO()
    torch.save(common_of_weights(reader.padding.plan), common)
    (release / COMMON).write_bytes(common.getbuffer())
    (release / state.NAME).write_text(state.to_json(run_state))
    write_index(release, _metadata(reader, chunks, list(objects)), written)
    for path in small_files:
        with open(path) as file:
            os.fsync(file.fileno())
    manifest = {name: file for share in written for name, file in share.files}
    write_manifest(release, manifest | describe(small_files))
    directory.sync(release)
    return set().union(*(nonfinite for _, nonfinite in results))


def _write_files(
    release: Path,
    rank: int,
    files: list[list[ChunkToWrite]],
    reader: HfReader,
    advance: Advance,
) -> tuple[WriteOutcome, set[str]]:
    """Write the files of one process, in parallel."""
    items = [_items(chunks, reader, advance) for chunks in files]
    return shard_writer.write_files(release, rank, items), reader.cast.nonfinite


def _items(chunks: list[ChunkToWrite], reader: HfReader, advance: Advance) -> Iterator[Item]:
    """Yield the chunks of a file; each is read after the one before is written."""
    for chunk in chunks:
        index = MetadataIndex(chunk.key, torch.Size(chunk.offset))
        yield WriteItem(index, WriteItemType.SHARD), reader.read(chunk)
        advance(chunk.numel() * reader.cast.dtype.itemsize)


def _extra_states(index: RangeIndex) -> Iterator[tuple[str, Item]]:
    """Yield the empty extra state of each Transformer Engine module; Megatron-LM's loader wants it.

    See tensor_schema.extra_state.
    """
    for key, shape in index.megatron_shapes.items():
        if extra := tensor_schema.extra_state(key):
            sizes = shape[: tensor_schema.stacked_axes(key)] or (1,)
            for stack_index in product(*map(range, sizes)):
                # as in ShardedObject.unique_key
                name = f"{extra}/shard_{_dotted(stack_index)}_{_dotted(sizes)}"
                empty = io.BytesIO()
                torch.save([None], empty)  # Megatron-Core reads a list of the objects of one key
                yield name, (WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO), empty)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _metadata(reader: HfReader, chunks: list[ChunkToWrite], objects: list[str]) -> Metadata:
    """Return the index of the checkpoint: every tensor with its chunks, and every object."""
    shapes = reader.index.megatron_shapes
    storage: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in shapes}
    for chunk in chunks:
        storage[chunk.key].append(
            ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size))
        )
    properties = TensorProperties(dtype=reader.cast.dtype)
    tensors = {
        key: TensorStorageMetadata(properties, torch.Size(shape), storage[key])
        for key, shape in shapes.items()
    }
    return Metadata(tensors | {name: BytesStorageMetadata() for name in objects})
