"""Fingerprints the training data and its order, so that a resumed run can report a change.

Rule: the fingerprint depends on the content of the files, not on their paths.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy

from mixtrain.data.datasets import datasets_of_blend

# positions of a .bin that are hashed, and bytes at each: hashing a whole terabyte would take hours
PROBES = 64
PROBE_BYTES = 1 << 16
DIGITS = 16
# Megatron's arrays: epochs, samples, order of the samples
ORDER_ARRAYS = ("document_index", "sample_index", "shuffle_index")


def fingerprint(dataset: Any) -> dict[str, str]:
    """Return {"documents": ..., "order": ...} of a training dataset, in hexadecimal digits.

    `documents` hashes the files of the blend and their weights. `order` hashes how samples are cut
    and shuffled, which also depends on seed, split, sequence length and the number of epochs.
    """
    documents = hashlib.sha256()
    order = hashlib.sha256()
    for gpt_dataset, share in datasets_of_blend(dataset):
        config = gpt_dataset.config
        documents.update(f"{share:.9f} ".encode())
        if gpt_dataset.dataset_path:
            _add_files(documents, str(gpt_dataset.dataset_path))
        order.update(f"{config.sequence_length} {config.random_seed} {config.mock} ".encode())
        for name in ORDER_ARRAYS:
            array = getattr(gpt_dataset, name, None)
            if array is not None:
                order.update(numpy.ascontiguousarray(array))
    return {"documents": documents.hexdigest()[:DIGITS], "order": order.hexdigest()[:DIGITS]}


def _add_files(digest: Any, prefix: str) -> None:
    """Hash the whole index, which has every document's length, and samples of the tokens."""
    with open(f"{prefix}.idx", "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    path = Path(f"{prefix}.bin")
    size = os.path.getsize(path)
    digest.update(f"{size} ".encode())
    with open(path, "rb") as file:
        for number in range(PROBES):
            file.seek(number * max(0, size - PROBE_BYTES) // (PROBES - 1))
            digest.update(file.read(PROBE_BYTES))


def difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """Return how the data differs from that of the checkpoint's run, as a clause; None if equal."""
    if before.get("documents") != now["documents"]:
        return "the documents differ (the files, or their weights in data.data_path)"
    if before.get("order") != now["order"]:
        return (
            "the same documents come in another order: keep seed, data.split and data.seq_length"
            " as they were, and trainer.max_steps and the batch size such that the number of"
            " epochs is the same"
        )
    return None
