"""From a directory of Hugging Face to a Megatron-Core checkpoint that any layout reads.

Rule: the chunks on the disk follow from the model alone, so that every layout of Hugging Face's
files gives the same checkpoint, byte for byte. No chunk is larger than BLOCK, and no more than a
few are in memory.
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
from mixtrain.interop.convert import hf_source, padding, source, spans
from mixtrain.interop.convert.casting import DTYPES, Casting, warn
from mixtrain.interop.convert.hf_files import Stored
from mixtrain.interop.convert.output import Advance, dealt, in_processes, written_whole
from mixtrain.interop.convert.source_config import configuration, run_state
from mixtrain.interop.convert.spans import Index
from mixtrain.interop.convert.weights import check, layout_of, mixtral

BLOCK = 1 << 26  # bytes of a chunk, at most


class Part(NamedTuple):
    """A chunk of a Megatron tensor: a box of it that lies together in the flat tensor, too."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int  # in the flat tensor
    stop: int

    def count(self) -> int:
        return self.stop - self.start


def convert(
    hf_dir: Path,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    processes: int = 1,
    allow_nonfinite: bool = False,
    divisible_by: int = 1,
) -> Config:
    """Write the Megatron checkpoint of a Hugging Face model to out_dir/release, with its tokenizer beside it.

    `divisible_by`: rows are added to the vocabulary until its size is. All but the numbers is checked before anything
    is written. UserError with everything that is wrong, a Fault if the disk is full: then there is no out_dir. The
    Config of the model.
    """
    found = source.read(hf_dir)
    tensors = found.tensors
    vocabulary = found.facts["model.vocab_size"]
    config = configuration(
        found.facts | {"model.vocab_size": padding.padded(vocabulary, divisible_by)}
    )
    mixtral(config)
    index = spans.index(config, layout_of(config, tensors), vocabulary)
    check(index.names, tensors, DTYPES.values(), mixed=dtype is not None)
    kept = dtype or next(iter(tensors.values())).dtype
    tokenizer_files(hf_dir)  # what is wrong with them is said before anything is copied
    parts = [part for key in index.shapes for part in parts_of(key, index.shapes[key], kept)]
    size = sum(map(Part.count, parts)) * kept.itemsize
    padded = padding.Padding(derive(config), vocabulary)
    origin = Origin(tensors, index, Casting(kept, allow_nonfinite), padded)
    run_of_none = run_state(config, hf_source.of_directory(hf_dir, found.values, vocabulary))
    for note in [*found.notes, *padded.notes()]:
        print(note, file=sys.stderr)
    objects = dict(_extra_states(index))
    with written_whole(out_dir, size, len(parts) + len(objects)) as out:
        release = out / directory.RELEASE
        release.mkdir()
        nonfinite = _write(release, run_of_none, origin, parts, objects, processes)
        copy_tokenizer(hf_dir, out / TOKENIZER)
        directory.write_atomically(out / directory.TRACKER, f"{directory.RELEASE}\n")
    warn(nonfinite)
    return config


class Origin(NamedTuple):
    """Hugging Face's tensors, to be read by the places of Megatron's."""

    tensors: dict[str, Stored]
    index: Index
    cast: Casting  # to the dtype to give them in
    padding: padding.Padding  # what they have not

    def read(self, part: Part) -> torch.Tensor:
        """A chunk: a window on a file where it lies together in one, else a copy."""
        found = list(
            spans.overlapping(self.index.by_key[part.key], part.start, part.stop, spans.PLACE)
        )
        pieces = [self.cast(run.name, self._part(run, low, high)) for run, low, high in found]
        if rest := part.stop - part.start - sum(piece.numel() for piece in pieces):
            pieces.append(
                self.padding.part(part.key, part.stop - rest, part.stop).to(self.cast.dtype)
            )
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(part.size)

    def _part(self, run: spans.Run, low: int, high: int) -> torch.Tensor:
        return self.tensors[run.name].part(run.start + low, run.start + high)


def parts_of(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Part]:
    """A tensor's chunks: a layer and an expert each, in even shares of rows where that is more than BLOCK."""
    axes = tensor_schema.stacked(key)
    inner = math.prod(shape[axes + 1 :])
    rows = shape[axes]
    shares = -(-rows * inner * dtype.itemsize // BLOCK)
    step = -(-rows // shares)
    for number, place in enumerate(product(*map(range, shape[:axes]))):
        for first in range(0, rows, step):
            count = min(step, rows - first)
            start = (number * rows + first) * inner
            offset = (*place, first, *(0 for _ in shape[axes + 1 :]))
            yield Part(
                key,
                offset,
                (*(1 for _ in place), count, *shape[axes + 1 :]),
                start,
                start + count * inner,
            )


def _write(
    release: Path,
    run: RunState,
    origin: Origin,
    parts: list[Part],
    objects: dict[str, Item],
    processes: int,
) -> set[str]:
    """Write the chunks, then what says where they lie, then the manifest, the last file of a checkpoint.

    The tensors in which NaN or infinite numbers were allowed. OSError if something could not be written.
    """
    shares = dealt(parts, processes * shard_writer.FILES_PER_RANK, Part.count)
    jobs = [
        partial(
            _write_share,
            release,
            rank,
            shares[rank * shard_writer.FILES_PER_RANK : (rank + 1) * shard_writer.FILES_PER_RANK],
            origin,
        )
        for rank in range(processes)
    ]
    done = in_processes(
        "to Megatron-Core", jobs, sum(map(Part.count, parts)) * origin.cast.dtype.itemsize
    )
    written = [share for share, _ in done] + [
        shard_writer.write_shards(release, processes, list(objects.values()))
    ]
    if wrong := next((share for share in written if share.error), None):
        raise OSError(wrong.errno or errno.EIO, wrong.error)
    small = [release / name for name in (COMMON, state.NAME, METADATA, CONFIG)]
    common = io.BytesIO()  # of a full disk torch.save says something else
    torch.save(common_of_weights(origin.padding.plan), common)
    (release / COMMON).write_bytes(common.getbuffer())
    (release / state.NAME).write_text(state.to_json(run))
    write_index(release, _metadata(origin, parts, list(objects)), written)
    for path in small:
        with open(path) as file:
            os.fsync(file.fileno())
    write_manifest(
        release, {name: file for share in written for name, file in share.files} | describe(small)
    )
    directory.sync(release)
    return set().union(*(names for _, names in done))


def _write_share(
    release: Path, rank: int, shares: list[list[Part]], origin: Origin, advance: Advance
) -> tuple[WriteOutcome, set[str]]:
    """Write one process's files, side by side."""
    written = shard_writer.write_files(
        release, rank, [_items(share, origin, advance) for share in shares]
    )
    return written, origin.cast.nonfinite


def _items(parts: list[Part], origin: Origin, advance: Advance) -> Iterator[Item]:
    """The chunks of a file, each made when the one before has been written."""
    for part in parts:
        yield item(part), origin.read(part)
        advance(part.count() * origin.cast.dtype.itemsize)


def item(part: Part) -> WriteItem:
    return WriteItem(MetadataIndex(part.key, torch.Size(part.offset)), WriteItemType.SHARD)


def _extra_states(index: Index) -> Iterator[tuple[str, Item]]:
    """The empty object of each Transformer Engine module that Megatron-LM's loader asks for (content.extra_states)."""
    for key, shape in index.shapes.items():
        if extra := tensor_schema.extra_state(key):
            sizes = shape[: tensor_schema.stacked(key)] or (1,)
            for place in product(*map(range, sizes)):
                # as ShardedObject.unique_key
                name = f"{extra}/shard_{_dotted(place)}_{_dotted(sizes)}"
                empty = io.BytesIO()
                torch.save([None], empty)  # Megatron-Core reads a list of the objects of one key
                yield name, (WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO), empty)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _metadata(origin: Origin, parts: list[Part], objects: list[str]) -> Metadata:
    """The index of the checkpoint: every tensor and its chunks, every object."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in origin.index.shapes}
    for part in parts:
        chunks[part.key].append(
            ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.size))
        )
    properties = TensorProperties(dtype=origin.cast.dtype)
    tensors = {
        key: TensorStorageMetadata(properties, torch.Size(shape), chunks[key])
        for key, shape in origin.index.shapes.items()
    }
    return Metadata(tensors | {name: BytesStorageMetadata() for name in objects})
