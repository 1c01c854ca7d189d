"""Files as they are, and those that gzip, bzip2, xz or Zstandard has compressed: read as a stream.

The rule it keeps: of a file that is damaged, or ends too early, nothing is taken for the whole.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from mixtrain.data.directory import is_pointer
from mixtrain.errors import UserError


def _zstandard(file):
    import pyarrow  # of `datasets`; Python's own is as new as 3.14

    return pyarrow.CompressedInputStream(file, "zstd")


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}
# how files begin that are no text, and the suffix that says so
BEGINS = {
    b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet",
    b"PK\x03\x04": ".zip",
}  # fmt: skip


def is_compressed(name: str) -> bool:
    return Path(name).suffix.lower() in COMPRESSED


def pieces(path: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """(at most `size` bytes of what the file holds, bytes of the file that were read for them), in order.

    OSError if the file cannot be opened; UserError if what it holds is damaged or cut short.
    """
    with open(path, "rb", buffering=0) as file:
        if not is_compressed(path.name):
            while piece := file.read(size):
                yield piece, len(piece)
            return
        if is_pointer(path):
            raise UserError(
                f"{path}: a Git LFS pointer, its content was not fetched; type git lfs pull there"
            )
        # gzip and Zstandard would take it for an empty text
        if path.is_file() and not path.stat().st_size:
            raise UserError(
                f"{path}: no byte is in it, and a {path.suffix} file has some; fetch it anew"
            )
        stream = COMPRESSED[path.suffix.lower()](file)
        before = 0
        while piece := _read(stream, path, size):
            after = file.tell() if file.seekable() else before
            yield piece, after - before
            before = after


def _read(stream, path: Path, size: int) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, cut short, or no {path.suffix} file ({why})") from error


def read(path: Path) -> bytes:
    """All that a file holds. Raises as `pieces` does."""
    return (
        b"".join(piece for piece, _ in pieces(path, 1 << 24))
        if is_compressed(path.name)
        else path.read_bytes()
    )
