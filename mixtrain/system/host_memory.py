"""Allocator settings for CPU ranks: huge pages, and freed memory stays with the process. No torch.

By default glibc returns large blocks to the kernel and gets zero-filled 4 KiB pages for the next
operation, which takes a tenth of a training step. glibc and PyTorch (c10/core/impl/alloc_cpu.cpp)
read these settings from the environment at process start; other C libraries ignore them.

Rule: a variable that the user has set keeps its value.
"""

from __future__ import annotations

SETTINGS = {
    # glibc from 2.35 on: 2 MiB huge pages for the heap; large blocks from the heap, too; never
    # return its end to the kernel
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"
    f":glibc.malloc.trim_threshold={1 << 40}",
    # PyTorch: align tensors of 2 MiB and more to huge pages
    "THP_MEM_ALLOC_ENABLE": "1",
}
