"""What a run's training data are and in which order they come, in a few digits: a change is said, not discovered.

Rule: the place of the files does not count, what is in them does.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy

from mixtrain.data.datasets import parts_of

# places of a .bin that are looked at, and bytes at each: all of a terabyte would take hours
PROBES = 64
PROBE = 1 << 16
DIGITS = 16
# Megatron's arrays: epochs, samples, their order
ORDER = ("document_index", "sample_index", "shuffle_index")


def fingerprint(dataset: Any) -> dict[str, str]:
    """{"documents": ..., "order": ...} of a training data set, in hexadecimal digits.

    `documents` are the files of its parts and their weights; `order` is that in which samples are
    made and drawn from them, which also follows from seed, split, sequence length and the number of
    epochs.
    """
    documents = hashlib.sha256()
    order = hashlib.sha256()
    for part, share in parts_of(dataset):
        config = part.config
        documents.update(f"{share:.9f} ".encode())
        if part.dataset_path:
            _add_files(documents, str(part.dataset_path))
        order.update(f"{config.sequence_length} {config.random_seed} {config.mock} ".encode())
        for name in ORDER:
            array = getattr(part, name, None)
            if array is not None:
                order.update(numpy.ascontiguousarray(array))
    return {"documents": documents.hexdigest()[:DIGITS], "order": order.hexdigest()[:DIGITS]}


def _add_files(digest: Any, prefix: str) -> None:
    """The whole index, which has every document's length, and probes of the tokens."""
    with open(f"{prefix}.idx", "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    path = Path(f"{prefix}.bin")
    size = os.path.getsize(path)
    digest.update(f"{size} ".encode())
    with open(path, "rb") as file:
        for number in range(PROBES):
            file.seek(number * max(0, size - PROBE) // (PROBES - 1))
            digest.update(file.read(PROBE))


def difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """What of the data is not what the checkpoint's run had, as the end of a sentence; None if nothing is."""
    if before.get("documents") != now["documents"]:
        return "the documents are others (the files, or their weights in data.data_path)"
    if before.get("order") != now["order"]:
        return (
            "the same documents come in another order: seed, data.split and data.seq_length must"
            " be as they were, and trainer.max_steps and the batch size must ask for as many"
            " epochs"
        )
    return None
