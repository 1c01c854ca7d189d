"""Tensors as windows on files: mapped, not read, so that a file of any size takes no memory of its own.

Rule: a window is a view of bytes on the disk and is gone with the last tensor that looks through it. Pages seen through
it count as this process's memory for as long: take small ones.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

# MADV_POPULATE_READ of Linux 5.14: all pages at once instead of one fault for each few
POPULATE_READ = 22
UNREADABLE = (errno.EFAULT, errno.EIO, 133)  # the last: EHWPOISON of Linux


def window(path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of `shape` and `dtype` that begins at byte `offset` of a file. OSError if the file has not so many."""
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    before = offset % mmap.PAGESIZE
    size = before + count * dtype.itemsize
    with open(path, "rb") as file:
        # private, for PyTorch wants memory that could be written to; nothing writes, and nothing is
        # copied
        try:
            mapped = mmap.mmap(file.fileno(), size, offset=offset - before, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise OSError(
                0, f"it ends before byte {offset - before + size:,}", str(path)
            ) from error
    try:
        mapped.madvise(mmap.MADV_WILLNEED)  # one large read ahead where the pages are not in memory
        mapped.madvise(POPULATE_READ)
    except OSError as error:  # EINVAL: an older Linux
        if error.errno in UNREADABLE:  # to touch the page would end this process, by SIGBUS
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from None
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=before).view(tuple(shape))
