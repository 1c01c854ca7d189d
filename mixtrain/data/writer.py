"""Megatron-Core's .bin and .idx, written a block of documents at a time.

The rule it keeps: every byte is the one that Megatron-Core's IndexedDatasetBuilder writes of the
same documents added one by one, and of a document that is written no more than its length stays in
memory.
"""

import contextlib
import hashlib
import os
import warnings
from array import array
from pathlib import Path

import numpy


class Writer:
    """Writes PREFIX.bin within the block, and PREFIX.idx when it is finished."""

    def __init__(self, prefix: Path, vocab_size: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing GPU libraries, which have no part in this
            from megatron.core.datasets import indexed_dataset  # seconds, and torch with it

        self.prefix = prefix
        self.upstream = indexed_dataset
        self.dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
        self.lengths = array("i")
        self.tokens = 0
        self.sha256 = hashlib.sha256()

    def __enter__(self) -> "Writer":
        self.file = open(f"{self.prefix}.bin", "wb")  # noqa: SIM115
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which has been said
            self.file.close()

    @property
    def documents(self) -> int:
        return len(self.lengths)

    def add(self, ids: numpy.ndarray, lengths: array) -> None:
        """Append documents: their ids one document after the other, and how many each has."""
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.lengths.extend(lengths)
        self.tokens += len(ids)

    def finish(self) -> str:
        """See the .bin on the disk and write the .idx; the sha256 of the first."""
        self.file.flush()
        os.fsync(self.file.fileno())
        lengths = numpy.frombuffer(self.lengths, numpy.int32)
        with self._index_writer()(f"{self.prefix}.idx", self.dtype) as index:
            index.write(lengths, None, numpy.arange(len(lengths) + 1))
        return self.sha256.hexdigest()

    def _index_writer(self) -> type:
        """Megatron-Core's writer, which counts where each document begins in a loop of Python: here numpy does."""
        width = numpy.dtype(self.dtype).itemsize

        class IndexWriter(self.upstream._IndexWriter):
            def _sequence_pointers(self, lengths: numpy.ndarray) -> numpy.ndarray:
                ends = numpy.cumsum(lengths, dtype=numpy.int64)
                return (ends - lengths) * width

        return IndexWriter
