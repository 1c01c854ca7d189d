"""Writes Megatron-Core's .bin and .idx, one block of documents at a time.

Rule: the files are identical to those of Megatron-Core's IndexedDatasetBuilder for the same
documents. After a document is written, only its length stays in memory.
"""

import contextlib
import hashlib
import os
import warnings
from array import array
from pathlib import Path

import numpy


class IndexedDatasetWriter:
    """Context manager that writes PREFIX.bin; finish() writes PREFIX.idx."""

    def __init__(self, prefix: Path, vocab_size: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing GPU libraries, which are not used here
            from megatron.core.datasets import indexed_dataset  # takes seconds and imports torch

        self.prefix = prefix
        self.upstream = indexed_dataset
        self.dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
        self.lengths = array("i")
        self.tokens = 0
        self.sha256 = hashlib.sha256()

    def __enter__(self) -> "IndexedDatasetWriter":
        self.file = open(f"{self.prefix}.bin", "wb")  # noqa: SIM115
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # a full disk, already reported
            self.file.close()

    @property
    def documents(self) -> int:
        return len(self.lengths)

    def add(self, ids: numpy.ndarray, lengths: array) -> None:
        """Append documents: the ids of all, concatenated, and the length of each."""
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.lengths.extend(lengths)
        self.tokens += len(ids)

    def finish(self) -> str:
        """Flush the .bin to disk, write the .idx, and return the sha256 of the .bin."""
        self.file.flush()
        os.fsync(self.file.fileno())
        lengths = numpy.frombuffer(self.lengths, numpy.int32)
        with self._index_writer()(f"{self.prefix}.idx", self.dtype) as index:
            index.write(lengths, None, numpy.arange(len(lengths) + 1))
        return self.sha256.hexdigest()

    def _index_writer(self) -> type:
        """Return Megatron-Core's index writer, with its Python loop over documents in numpy."""
        width = numpy.dtype(self.dtype).itemsize

        class IndexWriter(self.upstream._IndexWriter):
            def _sequence_pointers(self, lengths: numpy.ndarray) -> numpy.ndarray:
                ends = numpy.cumsum(lengths, dtype=numpy.int64)
                return (ends - lengths) * width

        return IndexWriter
