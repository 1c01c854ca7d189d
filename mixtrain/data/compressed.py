"""Plain and compressed files (gzip, bzip2, xz, Zstandard), read as streams.

Rule: a damaged or truncated compressed file raises an error; it is never taken for a complete one.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from mixtrain.data.directory import is_pointer
from mixtrain.errors import UserError


def _open_zstandard(file):
    import pyarrow  # a dependency of `datasets`; Python itself has zstd only from 3.14 on

    return pyarrow.CompressedInputStream(file, "zstd")


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}
# first bytes of binary files -> their suffix
MAGIC_BYTES = {
    b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet", b"PK\x03\x04": ".zip",
}  # fmt: skip


def is_compressed(name: str) -> bool:
    return Path(name).suffix.lower() in COMPRESSED


def read_chunks(path: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield (at most `size` bytes of decompressed content, bytes read from the file for them).

    Raises OSError if the file cannot be opened, UserError if its content is damaged or truncated.
    """
    with open(path, "rb", buffering=0) as file:
        if not is_compressed(path.name):
            while chunk := file.read(size):
                yield chunk, len(chunk)
            return
        if is_pointer(path):
            raise UserError(
                f"{path}: a Git LFS pointer, its content was not fetched; type git lfs pull there"
            )
        # gzip and Zstandard would decompress an empty file to an empty text
        if path.is_file() and not path.stat().st_size:
            raise UserError(
                f"{path}: the file is empty, and a {path.suffix} file never is; fetch it again"
            )
        stream = COMPRESSED[path.suffix.lower()](file)
        before = 0
        while chunk := _read(stream, path, size):
            after = file.tell() if file.seekable() else before
            yield chunk, after - before
            before = after


def _read(stream, path: Path, size: int) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{path}: damaged, truncated, or not a {path.suffix} file ({why})"
        ) from error


def read_file(path: Path) -> bytes:
    """Return the whole decompressed content of a file. Raises as `read_chunks` does."""
    if not is_compressed(path.name):
        return path.read_bytes()
    return b"".join(chunk for chunk, _ in read_chunks(path, 1 << 24))
