"""Memory that a CPU rank frees stays with it. No torch.

PyTorch's tensors on the CPU are malloc's. glibc gives large ones back to the kernel at once and gets them anew, page by
page and filled with zeros, in every operation: a tenth of a training step. Rule: only what a later tensor can take is
kept; how much a rank holds at the most does not change.
"""

from __future__ import annotations

import ctypes

# <malloc.h>
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4


def keep_what_is_freed() -> None:
    """From now on, in this process. Where the C library is not glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(MMAP_MAX, 0)  # large blocks come from the heap, as small ones do
    mallopt(TRIM_THRESHOLD, -1)  # whose end is never given back
    mallopt(TOP_PAD, 64 << 20)  # and which grows in large steps
