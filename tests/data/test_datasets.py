import math
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from mixtrain.data.batches import Batches
from mixtrain.data.datasets import build, unigram_entropy
from mixtrain.data.index import HEADER
from mixtrain.data.preprocess import preprocess
from mixtrain.data.sources import Files
from mixtrain.errors import UserError


@pytest.fixture
def built(indexed, tokenizer, tmp_path):
    """build() with default arguments for the small dataset; tests override them."""

    def with_(kind="indexed", **given):
        arguments = dict(
            data_path=[indexed],
            split="75,13,12",
            seq_length=32,
            seed=7,
            train_samples=20,
            valid_samples=6,
            test_samples=4,
            tokenizer_dir=tokenizer,
            vocab_size=512,
            path_to_cache=tmp_path / "cache",
            log=lambda line: None,
        )
        return build(kind, **(arguments | given))

    return with_


@pytest.fixture(scope="module")
def other(tmp_path_factory, library, tokenizer) -> str:
    """The prefix of another indexed dataset with the same tokenizer."""
    prefix = tmp_path_factory.mktemp("other") / "other"
    preprocess(
        Files(library, ["tarfile.py", "socket.py", "os.py", "ast.py"]),
        prefix,
        tokenizer,
        log=lambda line: None,
    )
    return str(prefix)


def tokens_of(dataset, count: int) -> torch.Tensor:
    return torch.stack([dataset[i]["tokens"] for i in range(count)])


def test_every_split_has_the_samples_asked_for_and_documents_of_its_own(built):
    parts = built()
    assert [len(part) >= wanted for part, wanted in zip(parts, (20, 6, 4), strict=True)] == [
        True
    ] * 3
    assert [part.indices.tolist() for part in parts] == [list(range(12)), [12, 13], [14, 15]]


def test_a_split_of_which_no_sample_is_wanted_is_none(built):
    train, valid, test = built(valid_samples=0, split="100,0,0", test_samples=0)
    assert len(train) >= 20 and valid is None and test is None
    assert built(train_samples=0)[0] is None


def test_samples_are_the_documents_in_order_with_labels_one_token_on(built, indexed):
    train, _, _ = built(seq_length=8, train_samples=2000)
    sample = train[0]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}  # and no attention mask
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    stream = numpy.fromfile(f"{indexed}.bin", numpy.uint16).astype(numpy.int64)
    windows = numpy.lib.stride_tricks.sliding_window_view(stream, 8)
    assert (windows == sample["tokens"].numpy()).all(axis=1).any()


def test_the_seed_decides_the_order(built):
    first, again, other_seed = (tokens_of(built(seed=seed)[0], 20) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other_seed)


def test_data_shorter_than_the_run_repeats_and_says_how_often(built):
    said = []
    train, _, _ = built(train_samples=5000, log=said.append)
    tokens = int(train.dataset.sequence_lengths[train.indices].sum())
    assert len(train) >= 5000
    assert said[0].startswith("data: train: 5,000 samples of 32 tokens from 12 documents of ")
    assert said[0].endswith(f", {tokens:,} tokens: {5000 * 32 / tokens:.3g} epochs")
    assert 5000 * 32 / tokens > 2 and len(said) == 4
    assert said[1] == (
        f"warning: data: train: the same {tokens:,} tokens of small are read"
        f" {5000 * 32 / tokens:.3g} times; {tokens // 32:,} samples are one epoch"
    )


def test_only_a_part_that_is_read_more_than_once_has_a_warning(built):
    said = []
    parts = built(log=said.append)
    tokens = [int(part.dataset.sequence_lengths[part.indices].sum()) for part in parts]
    assert not [line for line in said if "warning" in line]
    built(valid_samples=tokens[1] // 32, log=said.append)
    assert not [line for line in said if "warning" in line]
    built(valid_samples=tokens[1] // 32 + 1, log=said.append)
    assert [line.split(":")[2] for line in said if line.startswith("warning")] == [" valid"]
    said.clear()
    built("mock", train_samples=5000, log=said.append)
    assert said and not [line for line in said if "warning" in line]


def test_mock_data_needs_no_file_and_stays_below_any_vocabulary(built):
    for vocab_size in (7, 300):
        parts = built("mock", data_path=None, tokenizer_dir=None, vocab_size=vocab_size)
        assert all(part is not None for part in parts)
        assert int(tokens_of(parts[0], 20).max()) < vocab_size
        assert unigram_entropy(parts[1]) is None


def test_a_blend_takes_samples_by_weight(built, indexed, other):
    train, valid, _ = built(
        data_path=["0.25", indexed, "0.75", other], train_samples=100, split="60,20,20"
    )
    assert len(train) == 100 and len(valid) == 7  # Megatron rounds each part up
    assert numpy.bincount(train.dataset_index).tolist() == [25, 75]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_id_of_a_sample_leads_to_its_text(num_workers, built, indexed, other):
    """The id gives document and offset, also with reader processes and cached indices."""
    blend = dict(data_path=["0.25", indexed, "0.75", other], train_samples=100, split="60,20,20")
    built(**blend)
    train, _, _ = built(**blend)
    batches = Batches(
        train,
        global_batch_size=4,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        vocab_size=512,
        num_workers=num_workers,
    )
    read = [
        pair
        for batch in batches
        for pair in zip(batch["sample_ids"].tolist(), batch["tokens"], strict=True)
    ]
    assert len({tuple(sample) for sample, _ in read}) == 100 and {
        part for (part, _), _ in read
    } == {0, 1}
    for (part, number), tokens in read:
        source = train.datasets[part]
        document, offset = source.sample_index[number]
        rest = source.dataset.get(int(source.document_index[document]), offset=int(offset))[:32]
        assert tokens[: len(rest)].tolist() == rest.tolist()


def test_a_blend_without_weights_that_is_too_short_is_refused(built, indexed, other):
    with pytest.raises(
        UserError,
        match=r"gives \d+ train samples, but 100000 are wanted; give every prefix a weight",
    ):
        built(data_path=[indexed, other], train_samples=100_000, split="60,20,20")


def test_every_rank_reads_the_same_samples_as_one_process(
    on_ranks, built, indexed, other, tmp_path
):
    def read(rank: int):
        said = []
        single, _, _ = built(path_to_cache=tmp_path / "ranks", log=said.append)
        blend, _, _ = built(
            data_path=["1", indexed, "1", other], split="60,20,20", path_to_cache=tmp_path / "ranks"
        )
        mock, _, _ = built("mock", path_to_cache=tmp_path / "ranks")
        return (
            tokens_of(single, 20).tolist(),
            tokens_of(blend, 20).tolist(),
            tokens_of(mock, 5).tolist(),
            len(said),
        )

    first, second = on_ranks(2, read, tmp_path)
    assert first[:3] == second[:3] == read(0)[:3]
    assert (first[3], second[3]) == (3, 0)  # rank 0 speaks


def test_the_sample_index_is_cached_where_it_is_asked_for(built, tmp_path, indexed):
    before = sorted(os.listdir(Path(indexed).parent))
    first = tokens_of(built(path_to_cache=tmp_path / "here")[0], 20)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*.npy")}
    assert len(written) == 9  # three arrays for each of three splits
    assert torch.equal(tokens_of(built(path_to_cache=tmp_path / "here")[0], 20), first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*.npy")} == written
    assert sorted(os.listdir(Path(indexed).parent)) == before


def test_data_made_anew_under_an_old_name_is_not_read_through_the_old_index(
    built, indexed, other, tmp_path
):
    move_in(indexed, tmp_path / "x")
    arguments = dict(split="1,0,0", valid_samples=0, test_samples=0, train_samples=500)
    built(data_path=[str(tmp_path / "x")], **arguments)
    move_in(other, tmp_path / "x")
    renewed, _, _ = built(data_path=[str(tmp_path / "x")], **arguments)
    direct, _, _ = built(data_path=[other], **arguments)
    assert torch.equal(tokens_of(renewed, 500), tokens_of(direct, 500))


@pytest.mark.parametrize("kind", ["indexed", "mock"])
def test_a_sample_index_cut_short_is_refused_by_name(built, tmp_path, kind):
    built(kind)
    for path in (tmp_path / "cache").rglob("*train-shuffle_index.npy"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        UserError,
        match=f"{tmp_path}/cache.*: a sample index there cannot be read .* remove the dir",
    ):
        built(kind)


@pytest.mark.parametrize("kind", ["indexed", "mock"])
def test_a_cache_that_cannot_be_written_is_refused(on_ranks, built, tmp_path, kind):
    (tmp_path / "file").write_text("")

    def refusal(_: int) -> str:
        with pytest.raises(UserError) as refused:
            built(kind, path_to_cache=tmp_path / "file")
        return str(refused.value)

    (of_a_rank,) = on_ranks(1, refusal, tmp_path)  # there the builder wraps the error once more
    for said in (refusal(0), of_a_rank):
        assert said.startswith("data.path_to_cache: the sample index cannot be written")


def test_problems_with_the_files_are_refused_before_anything_is_built(built, tmp_path):
    with pytest.raises(UserError) as refusal:
        built(data_path=[str(tmp_path / "gone")], vocab_size=100)
    assert len(refusal.value.problems) == 2


def test_a_split_that_megatron_would_search_for_ever_is_refused(built):
    with pytest.raises(UserError, match="gives test no token"):
        built(split="969,30,1")


def test_what_rank_0_finds_in_the_index_every_rank_refuses(on_ranks, built, indexed, tmp_path):
    move_in(indexed, tmp_path / "x")
    with open(tmp_path / "x.idx", "r+b") as stream:
        stream.seek(HEADER.size + 4 * 6)
        stream.write(b"\xff\xff\xff\xff")

    def read(rank: int):
        with pytest.raises(UserError) as refusal:
            built(data_path=[str(tmp_path / "x")])
        return refusal.value.problems

    first, second = on_ranks(2, read, tmp_path)
    assert first == second and "sequence 6 of document 6 has -1 tokens" in first[0]


def test_the_unigram_entropy_is_that_of_the_tokens_of_the_split(built, indexed):
    _, valid, _ = built()
    documents = [valid.dataset[i].copy() for i in (12, 13)]
    tokens = numpy.concatenate(documents).tolist()
    expected = -sum(
        c / len(tokens) * math.log(c / len(tokens)) for c in map(tokens.count, set(tokens))
    )
    nats, count = unigram_entropy(valid)
    assert count == len(tokens) and nats == pytest.approx(expected, abs=1e-12)
    assert unigram_entropy(None) is None


def test_the_unigram_entropy_of_a_blend_weighs_its_parts_as_its_samples_do(built, indexed, other):
    blend, _, _ = built(data_path=["1", indexed, "3", other], split="60,20,20")
    first, _, _ = built(data_path=[indexed], split="60,20,20")
    second, _, _ = built(data_path=[other], split="60,20,20")

    def frequencies(dataset):
        counts = sum(
            numpy.bincount(dataset.dataset[int(i)], minlength=512) for i in dataset.indices
        )
        return counts / counts.sum()

    mixed = 0.25 * frequencies(first) + 0.75 * frequencies(second)
    expected = -sum(p * math.log(p) for p in mixed if p)
    nats, count = unigram_entropy(blend)
    assert nats == pytest.approx(expected, abs=1e-12)
    assert count == unigram_entropy(first)[1] + unigram_entropy(second)[1]


def move_in(prefix: str, target: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{suffix}", f"{target}{suffix}")
