"""How a CPU rank gets memory for its tensors: in large pages, and what it frees stays with it. No torch.

The C library gives large blocks back to the kernel and gets them anew, filled with zeros and in pages of 4 KiB, in
every operation: a tenth of a training step. Both it and PyTorch (c10/core/impl/alloc_cpu.cpp) take the settings from
the environment that a process starts with; a C library that is not glibc takes nothing. Rule: these are laid under the
user's environment, never over it.
"""

from __future__ import annotations

SETTINGS = {
    # glibc, from 2.35 on: huge pages (2 MiB) for the heap; large blocks from it too; its end is
    # never given back
    "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={1 << 40}",
    # PyTorch: tensors from 2 MiB on begin with such a page
    "THP_MEM_ALLOC_ENABLE": "1",
}
