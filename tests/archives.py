"""Files as torch.save writes them, and as it does not, for tests; and what is said of them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

import pytest
import torch

from mixtrain.checkpoint.archive import Archive
from mixtrain.checkpoint.pickles import Damaged, Unwanted


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zipped(parts: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as there:
        for each, data in parts.items():
            there.writestr(each, data)
    return file.getvalue()


def opened(data: bytes) -> Archive:
    return Archive(io.BytesIO(data))


def pickled(data: bytes) -> Archive:
    """An archive with this pickle."""
    return opened(zipped({"archive/data.pkl": data + b"."}))


def message_of(work: Callable[[], object]) -> str:
    with pytest.raises((Damaged, Unwanted)) as refusal:
        work()
    return f"{type(refusal.value).__name__}: {refusal.value}"
