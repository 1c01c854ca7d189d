"""Microbatches of one rank, in Megatron's order.

The rule it keeps: the samples of a step depend on how many samples were consumed and on nothing of
the layout, so that a run goes on with the same data at any number of ranks.
"""

from collections.abc import Iterator

import torch

from mixtrain.errors import UserError

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
IDS = "sample_ids"


class Batches:
    """This rank's microbatches of a data set, from sample `start` on: every iter() begins there again.

    Microbatch i of a step holds, for j < micro_batch_size, the samples
    consumed + (i * dp_size + dp_rank) * micro_batch_size + j, as Megatron's pretraining sampler deals them out.
    Yields dicts of CPU tensors tokens, labels, loss_mask, position_ids [micro_batch_size, seq_length] and sample_ids
    [micro_batch_size, 2]; ends where no whole global batch is left. `num_workers` > 0 reads ahead in that many
    processes.
    """

    def __init__(
        self, dataset, *, start: int = 0, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int,
        vocab_size: int, name: str = "train", num_workers: int = 0,
    ):  # fmt: skip
        if global_batch_size % (micro_batch_size * dp_size):
            raise UserError(
                f"trainer.global_batch_size = {global_batch_size} must be a multiple of"
                f" trainer.micro_batch_size = {micro_batch_size} times the data-parallel size"
                f" {dp_size}"
            )
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
        """Microbatches that one iter() yields."""
        steps = max(0, len(self.dataset) - self.start) // self.global_batch_size
        return steps * (self.global_batch_size // (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.num_workers:
            microbatches = torch.utils.data.DataLoader(
                self.dataset,
                batch_sampler=self._indices(),
                num_workers=self.num_workers,
                collate_fn=_collate,
                # else every iter() takes a number from the run's own random stream
                generator=torch.Generator(),
            )
        else:
            microbatches = (
                _collate([self.dataset[i] for i in indices]) for indices in self._indices()
            )
        for indices, microbatch in zip(self._indices(), microbatches, strict=True):
            self._refuse_unknown_tokens(indices, microbatch)
            yield {**microbatch, IDS: sample_ids(self.dataset, indices)}

    def _indices(self) -> Iterator[list[int]]:
        """The sample numbers of each of this rank's microbatches."""
        across = self.micro_batch_size * self.dp_size  # samples that all ranks read at once
        first = self.start + self.dp_rank * self.micro_batch_size
        for i in range(len(self)):
            begin = first + i * across
            yield list(range(begin, begin + self.micro_batch_size))

    def _refuse_unknown_tokens(
        self, indices: list[int], microbatch: dict[str, torch.Tensor]
    ) -> None:
        """An id outside the embedding is an index error on a CPU, and on a GPU a fault with no name."""
        for key in ("tokens", "labels"):
            for row, index in zip(microbatch[key], indices, strict=True):
                low, high = (int(bound) for bound in row.aminmax())
                if low < 0 or high >= self.vocab_size:
                    found, advice = (
                        (low, "the file is damaged")
                        if low < 0
                        else (high, f"use at least {high + 1}")
                    )
                    raise UserError(
                        f"{self._part_of(index)}: {self.name} sample {index} holds token id"
                        f" {found}, but model.vocab_size = {self.vocab_size}; {advice}"
                    )

    def _part_of(self, index: int) -> str:
        """The path of the data set that the sample comes from."""
        part = self.dataset
        if hasattr(part, "datasets"):
            part = part.datasets[part.dataset_index[index]]
        return str(getattr(part, "dataset_path", None) or type(part).__name__)


def _collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}


def sample_ids(dataset, indices: list[int]) -> torch.Tensor:
    """[len(indices), 2]: what samples are, in whatever order: part of the blend, sample before it was shuffled."""
    found = []
    for index in indices:
        part = 0
        of_part = dataset
        if hasattr(dataset, "datasets"):
            part = int(dataset.dataset_index[index])
            of_part = dataset.datasets[part]
            index = int(dataset.dataset_sample_index[index])
        found.append((part, int(of_part.shuffle_index[index])))
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)
