"""Large tensors of a CPU rank lie in large pages. No torch.

The C library gives large blocks back to the kernel and gets them anew, filled with zeros, in every operation: in pages
of 4 KiB that is a tenth of a training step, in huge ones (2 MiB) little. PyTorch asks for those where its environment
says so (c10/core/impl/alloc_cpu.cpp), and Linux has them for who asks. Keeping what is freed was as fast, but experts'
rows, of another number each time, then leave more and more holes: a rank grew with every step.
"""

from __future__ import annotations

import os

LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def use_large_pages() -> None:
    """From now on, in this process and those it starts. Before torch is imported; what the user has set stays."""
    os.environ.setdefault(LARGE_PAGES, "1")
