"""The digest of a step's samples does not depend on the layout or the number of readers."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from test_parity import CP, EP, PP, TP, VPP
from test_resume import records, start

from mixtrain.data.batches import sample_ids
from mixtrain.errors import FINISHED
from mixtrain.training.sample_digest import digest

LAYOUTS = {
    "EP2": [EP + "2"],
    "DP4, EP2": [EP + "2", "trainer.devices=4"],
    "PP2xVPP2": [EP + "1", PP + "2", VPP],
    "TP2xEP2": [EP + "2", *TP],
    "CP2": [EP + "1", CP],
    "in microbatches of 1": [EP + "1", "trainer.micro_batch_size=1"],
    "read ahead": [EP + "2", "data.num_workers=1"],
}


def digests(folder: Path, *words: str) -> list[str]:
    run_dir, codes, log = start(folder, "trainer.max_steps=2", "checkpoint=none", *words)
    assert codes == {FINISHED}, log
    return [record["sample_digest"] for record in records(run_dir) if "sample_digest" in record]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[str]:
    return digests(tmp_path_factory.mktemp("alone"), EP + "1")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_digests_are_those_of_one_rank(name, alone, tmp_path):
    assert digests(tmp_path, *LAYOUTS[name]) == alone


def test_every_step_has_another_digest_and_another_order_of_samples_too(alone, tmp_path):
    other = digests(tmp_path, EP + "1", "seed=99")
    assert len(set(alone + other)) == 4


class Part:
    def __init__(self, order: list[int]):
        self.shuffle_index = numpy.array(order)


class Blend:
    """The fields of Megatron-Core's BlendedDataset: each sample's dataset and its index in it."""

    datasets = [Part([3, 1, 2, 0]), Part([0, 1])]
    dataset_index = numpy.array([0, 1, 0])
    dataset_sample_index = numpy.array([0, 0, 1])


def test_an_id_is_the_part_and_the_sample_before_it_was_shuffled():
    assert sample_ids(Part([3, 1, 2, 0]), [0, 3]).tolist() == [[0, 3], [0, 0]]
    assert sample_ids(Blend(), [0, 1, 2]).tolist() == [[0, 3], [1, 0], [0, 1]]


def test_a_digest_is_16_hexadecimal_digits_of_the_ids():
    assert len(digest([[0, 1]])) == 16 and int(digest([[0, 1]]), 16) >= 0
    assert digest([[0, 1], [0, 2]]) != digest([[0, 1], [0, 3]]) != digest([[1, 1], [0, 3]])
