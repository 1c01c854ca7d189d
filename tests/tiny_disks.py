"""Disks that can be filled, or made read-only, without anybody else noticing.

They need root: without it, a skip.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def tiny_disk(folder: Path, size: str, name: str = "disk") -> Iterator[Path]:
    """A file system of `size` in folder, under this name."""
    disk = folder / name
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def mount(*words: str) -> None:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounts a file system")
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounts a file system: {done.stderr.strip()}")


def fill(directory: str | Path) -> None:
    """Leave no byte free on the disk of a directory."""
    with open(os.path.join(directory, "filler"), "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
