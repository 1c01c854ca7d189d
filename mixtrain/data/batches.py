"""Microbatches of one rank, in Megatron's order.

Rule: the samples of a step depend only on the number of samples consumed before it, never on the
parallel layout. A run therefore resumes with the same data at any number of ranks.
"""

from collections.abc import Iterator

import torch

from mixtrain.errors import UserError

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
IDS = "sample_ids"


class Batches:
    """The microbatches of this rank, from sample `start` on; every iter() starts there again.

    Microbatch i of a step holds samples consumed + (i * dp_size + dp_rank) * micro_batch_size + j,
    j < micro_batch_size: the order of Megatron's pretraining sampler. Yields dicts of CPU tensors:
    tokens, labels, loss_mask, position_ids [micro_batch_size, seq_length] and sample_ids
    [micro_batch_size, 2]. Drops the last, incomplete global batch. `num_workers` > 0 prefetches in
    that many processes. `global_batch_size` is a multiple of micro_batch_size * dp_size.
    """

    def __init__(
        self, dataset, *, start: int = 0, global_batch_size: int, micro_batch_size: int,
        dp_rank: int, dp_size: int, vocab_size: int, name: str = "train", num_workers: int = 0,
    ):  # fmt: skip
        self.dataset = dataset
        self.start = start
        self.name = name
        self.num_workers = num_workers
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        """Return the number of microbatches that one iter() yields."""
        steps = max(0, len(self.dataset) - self.start) // self.global_batch_size
        return steps * (self.global_batch_size // (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.num_workers:
            microbatches = torch.utils.data.DataLoader(
                self.dataset,
                batch_sampler=self._indices(),
                num_workers=self.num_workers,
                collate_fn=_collate,
                # without it every iter() draws from the run's global random stream
                generator=torch.Generator(),
            )
        else:
            microbatches = (
                _collate([self.dataset[i] for i in indices]) for indices in self._indices()
            )
        for indices, microbatch in zip(self._indices(), microbatches, strict=True):
            self._check_token_ids(indices, microbatch)
            yield {**microbatch, IDS: sample_ids(self.dataset, indices)}

    def _indices(self) -> Iterator[list[int]]:
        """Yield the sample numbers of each microbatch of this rank."""
        samples_of_all_ranks = self.micro_batch_size * self.dp_size  # per microbatch
        first = self.start + self.dp_rank * self.micro_batch_size
        for i in range(len(self)):
            begin = first + i * samples_of_all_ranks
            yield list(range(begin, begin + self.micro_batch_size))

    def _check_token_ids(self, indices: list[int], microbatch: dict[str, torch.Tensor]) -> None:
        """Raise UserError for an id outside the embedding, which on a GPU faults without a name."""
        for key in ("tokens", "labels"):
            for row, index in zip(microbatch[key], indices, strict=True):
                low, high = (int(bound) for bound in row.aminmax())
                if low < 0:
                    token_id, advice = low, "the file is damaged"
                elif high >= self.vocab_size:
                    token_id, advice = high, f"use at least {high + 1}"
                else:
                    continue
                raise UserError(
                    f"{self._source_of(index)}: {self.name} sample {index} holds token id"
                    f" {token_id}, but model.vocab_size = {self.vocab_size}; {advice}"
                )

    def _source_of(self, index: int) -> str:
        """Return the path of the dataset that the sample comes from."""
        dataset = self.dataset
        if hasattr(dataset, "datasets"):
            dataset = dataset.datasets[dataset.dataset_index[index]]
        return str(getattr(dataset, "dataset_path", None) or type(dataset).__name__)


def _collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}


def sample_ids(dataset, indices: list[int]) -> torch.Tensor:
    """Return [len(indices), 2]: (dataset of the blend, sample number before shuffling) of each.

    The ids identify samples independently of their order.
    """
    ids = []
    for index in indices:
        blend_index = 0
        source = dataset
        if hasattr(dataset, "datasets"):
            blend_index = int(dataset.dataset_index[index])
            source = dataset.datasets[blend_index]
            index = int(dataset.dataset_sample_index[index])
        ids.append((blend_index, int(source.shuffle_index[index])))
    return torch.tensor(ids, dtype=torch.int64).view(-1, 2)
