import pytest
import torch

from mixtrain.data.batches import KEYS, Batches
from mixtrain.errors import UserError


class Counting:
    """A dataset whose sample i has the number i everywhere."""

    def __init__(self, length: int):
        self.length = length
        self.shuffle_index = range(length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return {key: torch.full((4,), index) for key in KEYS}


def batches(dataset, rank=0, size=1, micro=2, start=0, **more) -> Batches:
    return Batches(
        dataset,
        start=start,
        global_batch_size=8,
        micro_batch_size=micro,
        dp_rank=rank,
        dp_size=size,
        vocab_size=1000,
        **more,
    )


def steps_of(*ranks: Batches) -> list[set[int]]:
    """Return the samples of each step on all ranks."""
    per_rank = [[batch["tokens"][:, 0].tolist() for batch in rank] for rank in ranks]
    microbatches = 8 // (len(ranks) * ranks[0].micro_batch_size)
    steps = len(per_rank[0]) // microbatches
    return [
        {
            i
            for rows in per_rank
            for row in rows[step * microbatches : (step + 1) * microbatches]
            for i in row
        }
        for step in range(steps)
    ]


@pytest.mark.parametrize("size, micro", [(1, 1), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_a_step_holds_the_same_samples_at_every_layout(size, micro):
    ranks = [batches(Counting(50), rank, size, micro, start=16) for rank in range(size)]
    assert steps_of(*ranks) == [set(range(first, first + 8)) for first in (16, 24, 32, 40)]


def test_microbatches_are_dealt_out_in_megatrons_order():
    dealt = [batch["tokens"][:, 0].tolist() for batch in batches(Counting(16), rank=1, size=2)]
    assert dealt == [[2, 3], [6, 7], [10, 11], [14, 15]]


def test_a_batch_has_four_tensors_of_microbatch_by_sequence_and_its_ids(indexed_train):
    batch = next(iter(batches(indexed_train)))
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in batch.items()} == {
        "tokens": ((2, 32), torch.int64),
        "labels": ((2, 32), torch.int64),
        "loss_mask": ((2, 32), torch.float32),
        "position_ids": ((2, 32), torch.int64),
        "sample_ids": ((2, 2), torch.int64),
    }
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert (
        torch.equal(batch["position_ids"], torch.arange(32).expand(2, 32))
        and batch["loss_mask"].all()
    )


def test_every_iteration_begins_at_the_start_again():
    validation = batches(Counting(16), start=8)
    assert steps_of(validation) == steps_of(validation) == [set(range(8, 16))]


def test_the_iteration_ends_where_no_whole_global_batch_is_left():
    assert len(batches(Counting(15))) == 4 and len(list(batches(Counting(15)))) == 4
    assert (
        len(batches(Counting(20), start=16)) == 0 and list(batches(Counting(20), start=100)) == []
    )


def test_reading_ahead_in_other_processes_changes_nothing(indexed_train):
    plain = list(batches(indexed_train))
    ahead = list(batches(indexed_train, num_workers=2))
    assert len(plain) == len(ahead) > 0
    assert all(
        torch.equal(one[key], other[key])
        for one, other in zip(plain, ahead, strict=True)
        for key in KEYS
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_takes_nothing_from_the_random_stream_of_the_run(num_workers):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    list(batches(Counting(8), num_workers=num_workers))
    assert torch.rand(1) == expected


def test_a_token_outside_the_vocabulary_is_refused_with_its_place(indexed_train):
    sample = next(
        i for i in range(len(indexed_train)) if int(indexed_train[i]["tokens"].max()) >= 400
    )
    token = max(int(indexed_train[sample][key].max()) for key in ("tokens", "labels"))
    small = Batches(
        indexed_train,
        start=sample,
        global_batch_size=1,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        vocab_size=400,
        name="valid",
    )
    with pytest.raises(UserError) as refusal:
        next(iter(small))
    found = int(
        next(v for k in ("tokens", "labels") if (v := indexed_train[sample][k].max()) >= 400)
    )
    assert str(refusal.value) == (
        f"{indexed_train.dataset_path}: valid sample {sample} holds token id {found}, but"
        f" model.vocab_size = 400; use at least {found + 1}"
    )
    assert found <= token


def test_a_negative_token_is_refused():
    class Damaged(Counting):
        def __getitem__(self, index):
            return {key: torch.tensor([3, -5]) for key in KEYS}

    with pytest.raises(
        UserError, match="Damaged: train sample 0 holds token id -5, .* the file is damaged"
    ):
        next(iter(batches(Damaged(8))))


@pytest.fixture(scope="module")
def indexed_train(indexed, tokenizer):
    from mixtrain.data.datasets import build

    train, _, _ = build(
        "indexed",
        data_path=[indexed],
        split="1,0,0",
        seq_length=32,
        seed=1,
        train_samples=64,
        valid_samples=0,
        test_samples=0,
        tokenizer_dir=tokenizer,
        vocab_size=512,
        path_to_cache=None,
        log=lambda line: None,
    )
    return train
