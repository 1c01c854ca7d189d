"""A list of every tensor on both sides: name, shape, dtype, SHA-256 of what lies on the disk, whether they agree."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from mixtrain.checkpoint.tensor_reader import TensorReader
from mixtrain.config.schema import Config
from mixtrain.interop.convert import spans
from mixtrain.interop.convert.hf_files import Stored
from mixtrain.interop.convert.output import Advance
from mixtrain.interop.convert.weights import layout_of

BLOCK = 1 << 24  # elements


def entries(
    config: Config,
    tensors: dict[str, Stored],
    parts: TensorReader,
    vocabulary: int,
    advance: Advance,
) -> Iterator[dict[str, Any]]:
    """One for each tensor of Hugging Face, with the Megatron tensor it is a part of, and the SHA-256 of both.

    `equal`: bit for bit, after the checkpoint's numbers were brought to the dtype of the file.
    """
    index = spans.index(config, layout_of(config, tensors), vocabulary)
    for name, shape in index.names.items():
        stored = tensors[name]
        own = hashlib.sha256()
        there = hashlib.sha256()
        equal = True
        for start in range(0, math.prod(shape), BLOCK):
            stop = min(start + BLOCK, math.prod(shape))
            theirs = stored.part(start, stop)
            ours = [
                parts.flat(run.key, run.place + low, run.place + high)
                for run, low, high in spans.overlapping(
                    index.by_name[name], start, stop, spans.START
                )
            ]
            mine = torch.cat(ours) if len(ours) > 1 else ours[0]
            there.update(_bytes(theirs))
            own.update(_bytes(mine))
            equal &= bool(
                torch.equal(theirs.view(torch.uint8), mine.to(stored.dtype).view(torch.uint8))
            )
            advance((stop - start) * stored.dtype.itemsize)
        key = index.by_name[name][0].key
        yield {
            "name": name,
            "shape": list(shape),
            "dtype": _dtype(stored.dtype),
            "sha256": there.hexdigest(),
            "megatron": {
                "key": key,
                "shape": list(parts.shapes[key]),
                "dtype": _dtype(parts.dtypes[key]),
                "sha256_of_part": own.hexdigest(),
            },
            "equal": equal,
        }


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
