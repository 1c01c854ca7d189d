"""The .bin and .idx written in blocks are identical to those of Megatron-Core's builder."""

from array import array

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from mixtrain.data.writer import IndexedDatasetWriter


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 200_000])
def test_every_byte_is_the_builders(vocab_size, tmp_path):
    random = numpy.random.default_rng(5)
    documents = [
        random.integers(0, vocab_size, length)
        for length in [1, 7, 5000, 2, *random.integers(1, 60, 3000)]
    ]
    builder = IndexedDatasetBuilder(
        str(tmp_path / "one.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "one.idx"))
    with IndexedDatasetWriter(tmp_path / "two", vocab_size) as writer:
        for begin in range(0, len(documents), 700):
            block = documents[begin : begin + 700]
            writer.add(numpy.concatenate(block), array("i", map(len, block)))
        writer.add(numpy.empty(0, numpy.int32), array("i"))  # a block without readable documents
        writer.finish()
    assert (writer.documents, writer.tokens) == (len(documents), sum(map(len, documents)))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
