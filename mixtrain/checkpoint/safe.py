"""Read checkpoints from untrusted sources: nothing in them is executed, called or changed.

PyTorch opens .metadata with a bare pickle.load; its restricted unpickler for the other files calls
the constructors, and sets the state, of every class that a library has declared safe.
Rule: no unpickler opens a file of a checkpoint. Pickles are parsed as data (pickles.py), and
metadata.py and archive.py build the needed objects from them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch.distributed.checkpoint.metadata import Metadata

from mixtrain.checkpoint import metadata, pickles
from mixtrain.checkpoint.archive import Archive
from mixtrain.errors import UserError

METADATA = ".metadata"
COMMON = "common.pt"


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file of a checkpoint; errors of the block become UserErrors with the file's name."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # opening a pipe would block

    try:
        with open(path, "rb", opener=opener) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path} is not a file")
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except pickles.Unwanted as error:
        raise UserError(f"{path}: {error}") from None
    except pickles.Damaged as error:
        separator = " " if str(error).startswith("at byte") else ": "
        raise UserError(f"{path} is damaged{separator}{error}") from None


def read_metadata(directory: Path) -> Metadata:
    """Return the index: the tensors, and the file of each chunk. UserError if it is invalid."""
    with reading(Path(directory) / METADATA) as file:
        if (size := os.fstat(file.fileno()).st_size) > pickles.MOST:
            raise pickles.Damaged(f"it has {size:,} bytes; at most {pickles.MOST:,} are read")
        return metadata.metadata_of(pickles.read(file.read(size), metadata.ALLOWED))


def read_common(directory: Path) -> dict[str, Any]:
    """Return common.pt, the state of all ranks; its objects are PickleRecords, not instances.

    UserError if it is missing, damaged or names a class or function that is not allowed.
    """
    with reading(Path(directory) / COMMON) as file:
        common = Archive(file).tree()
        if type(common) is not dict:
            raise pickles.Damaged("it is not the common state of a checkpoint")
        return common
