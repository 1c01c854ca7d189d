"""List every tensor of both sides: name, shape, dtype, SHA-256 of its bytes, and equality."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from mixtrain.checkpoint.tensor_reader import TensorReader
from mixtrain.config.schema import Config
from mixtrain.interop.convert import flat_ranges
from mixtrain.interop.convert.hf_files import StoredTensor
from mixtrain.interop.convert.weights import layout_of
from mixtrain.interop.convert.workers import Advance

BLOCK = 1 << 24  # elements


def entries(
    config: Config,
    tensors: dict[str, StoredTensor],
    parts: TensorReader,
    hf_vocab_size: int,
    advance: Advance,
) -> Iterator[dict[str, Any]]:
    """Yield an entry for each Hugging Face tensor, with its part of a Megatron tensor.

    `equal`: bitwise, after a cast of the checkpoint's elements to the file's dtype.
    """
    index = flat_ranges.build_index(config, layout_of(config, tensors), hf_vocab_size)
    for name, shape in index.hf_shapes.items():
        stored = tensors[name]
        hf_hash = hashlib.sha256()
        megatron_hash = hashlib.sha256()
        equal = True
        for start in range(0, math.prod(shape), BLOCK):
            stop = min(start + BLOCK, math.prod(shape))
            theirs = stored.read(start, stop)
            overlaps = flat_ranges.overlapping(
                index.by_name[name], start, stop, flat_ranges.HF_START
            )
            blocks = [
                parts.flat(run.key, run.megatron_start + low, run.megatron_start + high)
                for run, low, high in overlaps
            ]
            ours = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
            hf_hash.update(_bytes(theirs))
            megatron_hash.update(_bytes(ours))
            cast = ours.to(stored.dtype)
            equal &= torch.equal(theirs.view(torch.uint8), cast.view(torch.uint8))
            advance((stop - start) * stored.dtype.itemsize)
        key = index.by_name[name][0].key
        yield {
            "name": name,
            "shape": list(shape),
            "dtype": _dtype_name(stored.dtype),
            "sha256": hf_hash.hexdigest(),
            "megatron": {
                "key": key,
                "shape": list(parts.shapes[key]),
                "dtype": _dtype_name(parts.dtypes[key]),
                "sha256_of_part": megatron_hash.hexdigest(),
            },
            "equal": equal,
        }


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
