"""Write a conversion's directory: it gets its final name only when all of it is on the disk.

Rule: a killed conversion leaves OUT_DIR.writing. No reader takes it for a model, and the next
conversion to OUT_DIR removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mixtrain.checkpoint.directory import sync
from mixtrain.errors import Fault, UserError
from mixtrain.system import partial

MARGIN = 1 << 22  # bytes for small files
# bytes of a tensor or chunk in headers, an index and a manifest, beside its data
HEADER = 1 << 11


@contextlib.contextmanager
def written_whole(out: Path, size: int, chunks: int) -> Iterator[Path]:
    """Yield an empty directory that is renamed to `out` if the block succeeds, else removed.

    `size`: bytes of all tensors; `chunks`: their number. UserError if `out` exists and is not an
    empty directory, if another conversion is writing it, or if its disk has too little space. An
    OSError in the block becomes a Fault: the file that could not be written or read and, if the
    disk is full, the bytes needed and free.
    """
    out = Path(os.path.abspath(out))
    margin = MARGIN + HEADER * chunks
    needed = f"{size:,} bytes, and up to {margin:,} for headers and small files"
    if out.exists() and not (out.is_dir() and not os.listdir(out)):
        raise UserError(f"{out} is there already: give a new directory, or remove it")
    writing = out.with_name(out.name + ".writing")
    made = partial.make(writing)
    with partial.claim(writing, "conversion"):
        try:
            for path in writing.iterdir():  # from a killed conversion
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if (free := partial.free(writing)) < size + margin:
                raise UserError(f"{out} takes {needed}, but {free:,} are free on its disk")
            yield writing
            sync(writing)
            writing.chmod(0o777 & ~_umask())
            os.rename(writing, out)
            sync(out.parent)
        except OSError as error:
            # measure the free space before removing the directory
            message = partial.failure_message(out, writing, error, needed)
            partial.remove(made or [writing])
            raise Fault(message) from None
        except BaseException:
            partial.remove(made or [writing])
            raise


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
