"""Reading checkpoints that somebody else may have written: nothing in them is run, called or changed.

PyTorch opens .metadata with a bare pickle.load; its restricted reader of the other pickles calls the constructors, and
sets the state, of every class that a library has named to it. Rule: no unpickler opens a file of a checkpoint. Pickles
are read as text (pickles.py), and what is needed of them is made here (metadata.py, archive.py).
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
    """A file of a checkpoint, open; what is wrong with it, found while it is, is a UserError with its name."""
    try:
        # a pipe would be waited for
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path} is no file")
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except pickles.Unwanted as error:
        raise UserError(f"{path}: {error}") from None
    except pickles.Damaged as error:
        raise UserError(
            f"{path} is damaged{' ' if str(error).startswith('at byte') else ': '}{error}"
        ) from None


def read_metadata(directory: Path) -> Metadata:
    """The index of a checkpoint: which tensors there are, and in which file each part lies. UserError if it is none."""
    with reading(Path(directory) / METADATA) as file:
        if (size := os.fstat(file.fileno()).st_size) > pickles.MOST:
            raise pickles.Damaged(f"it has {size:,} bytes; at most {pickles.MOST:,} are read")
        return metadata.metadata_of(pickles.read(file.read(size), metadata.ALLOWED))


def read_common(directory: Path) -> dict[str, Any]:
    """common.pt: what all ranks share. Numbers and text are as they are, objects are pickles.Records of them.

    UserError if it is missing, damaged or names more than it may.
    """
    with reading(Path(directory) / COMMON) as file:
        common = Archive(file).tree()
        if type(common) is not dict:
            raise pickles.Damaged("it is not the common state of a checkpoint")
        return common
