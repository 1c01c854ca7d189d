"""Memory-map parts of files as tensors: a file of any size takes no memory of its own.

Rule: the mapping lives as long as any tensor that views it. Pages that were read count as memory
of this process until then, so map small parts.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

# MADV_POPULATE_READ, Linux 5.14: all pages at once instead of a page fault for every few
POPULATE_READ = 22
UNREADABLE = (errno.EFAULT, errno.EIO, 133)  # 133: EHWPOISON of Linux


def map_tensor(path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Map the tensor of `shape` and `dtype` at byte `offset`. Raises OSError for a shorter file."""
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    before = offset % mmap.PAGESIZE
    size = before + count * dtype.itemsize
    with open(path, "rb") as file:
        # a private mapping, because PyTorch asks for writable memory; nothing is written or copied
        try:
            mapped = mmap.mmap(file.fileno(), size, offset=offset - before, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise OSError(
                0, f"it ends before byte {offset - before + size:,}", str(path)
            ) from error
    try:
        mapped.madvise(mmap.MADV_WILLNEED)  # one large read for pages that are not in memory
        mapped.madvise(POPULATE_READ)
    except OSError as error:  # EINVAL on an older Linux
        if error.errno in UNREADABLE:  # access to the page would end this process with SIGBUS
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from None
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=before).view(tuple(shape))
