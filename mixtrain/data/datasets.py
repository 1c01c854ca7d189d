"""Builds Megatron-Core's datasets for a run, and measures them.

Rule: every sample comes from Megatron's own GPTDataset, built by its builder. Inputs on which the
builder would hang, or which it would accept silently (an empty split, a blend that is too short, a
cached index of other data), raise an error here first.
"""

import contextlib
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import torch

from mixtrain.config.data_blend import parse_blend
from mixtrain.data.check import SPLITS, check_files
from mixtrain.data.index import HEADER, read_index
from mixtrain.data.tokenizer import tokenizer_eod_id, tokenizer_sha256, tokenizer_vocab_size
from mixtrain.errors import UserError
from mixtrain.system import collectives

DOCUMENTS_AT_ONCE = 1024  # read together when tokens are counted


@dataclass(frozen=True)
class TokenizerMetadata:
    """The tokenizer attributes that a GPTDataset reads.

    Used instead of Megatron's own tokenizer object. With that object a GPTDataset masks the loss of
    every token equal to the padding token, which in many published tokenizers is a real token. If
    the first sample contains one, the GPTDataset masks that position in every later sample too,
    because it modifies the mask that it caches. Our data contains no padding.
    """

    vocab_size: int
    eod: int
    name: str

    @property
    def unique_identifiers(self) -> OrderedDict:
        """Return the part of the cached sample index's name that identifies the tokenizer."""
        return OrderedDict(name=self.name, vocab_size=self.vocab_size, eod=self.eod)


def build(
    kind: Literal["mock", "indexed"], *, data_path: list[str] | None, split: str, seq_length: int,
    seed: int, train_samples: int, valid_samples: int, test_samples: int,
    tokenizer_dir: Path | None, vocab_size: int, path_to_cache: Path | None, log=print,
):  # fmt: skip
    """Return the (train, valid, test) datasets, each with at least as many samples as requested.

    A dataset of 0 requested samples is None. A sample is a dict of CPU tensors tokens, labels,
    loss_mask, position_ids [seq_length]. Call this on every rank: rank 0 writes the sample index to
    path_to_cache, the other ranks read it. kind "mock" is Megatron's counting data (data_path,
    split and tokenizer_dir are ignored); "indexed" reads .bin and .idx files. Raises UserError.
    """
    samples = (train_samples, valid_samples, test_samples)
    if kind == "mock":
        tokenizer = TokenizerMetadata(vocab_size, vocab_size - 1, "mock")
        config = _config(None, None, seq_length, seed, tokenizer, path_to_cache)
    else:
        problems = check_files(
            data_path,
            tokenizer_dir,
            vocab_size,
            split,
            samples,
            seq_length=seq_length,
            every_entry=_rank() == 0,
        )
        if problems := collectives.first_problem(problems):
            raise UserError(*problems)
        tokenizer = TokenizerMetadata(
            tokenizer_vocab_size(tokenizer_dir),
            tokenizer_eod_id(tokenizer_dir),
            tokenizer_sha256(tokenizer_dir),
        )
        config = _config(
            data_path, split, seq_length, seed, tokenizer, _index_cache(data_path, path_to_cache)
        )
    datasets = _build(config, samples)
    for name, needed, dataset in zip(SPLITS, samples, datasets, strict=True):
        if dataset is not None:
            _check_length(dataset, name, needed)
            for line in _describe(dataset, name, needed, seq_length):
                if _rank() == 0:
                    log(line)
    return tuple(datasets)


def _config(
    data_path, split, seq_length: int, seed: int, tokenizer: TokenizerMetadata, path_to_cache
):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=get_blend_from_list(data_path),  # None means mock
        split=split,
        num_dataset_builder_threads=1,
        path_to_cache=None if path_to_cache is None else str(path_to_cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # the attention layers are causal without a mask
    )


def _index_cache(data_path: list[str], path_to_cache: Path | None) -> Path:
    """Return the directory for the sample index of exactly these documents.

    Megatron names a cached index by path, seed, split and number of samples, not by the content of
    the files. In a shared directory, data rewritten under an old name would be read through the
    index of the old data. The index depends only on the lengths of the documents, so rank 0 hashes
    the lengths and broadcasts the directory's name.
    """
    prefixes, _ = parse_blend(data_path)

    def name_of_lengths() -> str:
        digest = hashlib.sha256()
        for prefix in prefixes:
            end_of_lengths = HEADER.size + 4 * read_index(prefix).sequences
            digest.update(numpy.memmap(f"{prefix}.idx", mode="r")[:end_of_lengths])
        return digest.hexdigest()[:12]

    name = collectives.from_first(name_of_lengths)
    if path_to_cache is None:
        return Path(prefixes[0]).parent / "index_cache" / name
    return Path(path_to_cache) / name


def _build(config, samples: tuple[int, int, int]) -> list:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

    for i, needed in enumerate(samples):
        if not needed:
            config.split_matrix[i] = None  # the builder then skips this split
    cls = MockGPTDataset if config.mock else GPTDataset
    try:
        with _process_group_for(config):
            return BlendedMegatronDatasetBuilder(cls, list(samples), lambda: True, config).build()
    except Exception as error:
        root = error  # the builder wraps it, for mock data twice
        while root.__cause__:
            root = root.__cause__
        if isinstance(root, (ValueError, EOFError)):  # numpy.load, for a truncated file
            raise UserError(
                f"{config.path_to_cache}: a sample index there cannot be read ({root}); a run was"
                " probably killed while writing it; remove the directory, the next run rebuilds it"
            ) from error
        if not isinstance(root, OSError):
            raise
        raise UserError(
            f"data.path_to_cache: the sample index cannot be written or read ({root}); "
            "give a directory that is writable and that every rank can read"
        ) from error


@contextlib.contextmanager
def _process_group_for(config):
    """Create a group of one process while a blend is built outside torch.distributed.

    megatron-core 0.16 asks for the rank when it builds a blend.
    """
    if config.blend is None or len(config.blend[0]) == 1 or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _check_length(dataset, name: str, needed: int) -> None:
    if len(dataset) < needed:
        raise UserError(
            "data.data_path without weights reads each data set at most once, which gives"
            f" {len(dataset)} {name} samples, but {needed} are wanted; give every prefix a weight,"
            " then the data sets repeat"
        )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def datasets_of_blend(dataset) -> list[tuple[object, float]]:
    """Return the GPTDatasets of a dataset, each with its share of the samples."""
    if not hasattr(dataset, "datasets"):
        return [(dataset, 1.0)]
    total = sum(dataset.weights)
    return [
        (gpt_dataset, weight / total)
        for gpt_dataset, weight in zip(dataset.datasets, dataset.weights, strict=True)
    ]


def _entry_kind(data) -> str:
    """Return "sequences" if documents have several (Megatron's own tool), else "documents"."""
    boundaries = getattr(data, "document_indices", None)  # mock data has none
    if boundaries is None or len(boundaries) - 1 == len(data.sequence_lengths):
        return "documents"
    return "sequences"


def _describe(dataset, name: str, needed: int, seq_length: int) -> list[str]:
    """Return a line per dataset of the blend: its size and epochs, and a warning above 1 epoch."""
    lines = []
    for gpt_dataset, share in datasets_of_blend(dataset):
        tokens = int(gpt_dataset.dataset.sequence_lengths[gpt_dataset.indices].sum())
        samples = round(needed * share)
        source = f" of {Path(gpt_dataset.dataset_path).name}" if gpt_dataset.dataset_path else ""
        epochs = samples * seq_length / tokens
        lines.append(
            f"data: {name}: {samples:,} samples of {seq_length:,} tokens from"
            f" {len(gpt_dataset.indices):,} {_entry_kind(gpt_dataset.dataset)}{source}, {tokens:,}"
            f" tokens: {epochs:.3g} epochs"
        )
        if epochs > 1 and not gpt_dataset.config.mock:
            lines.append(
                f"warning: data: {name}: the same {tokens:,} tokens{source} are read {epochs:.3g}"
                f" times; {tokens // seq_length:,} samples are one epoch"
            )
    return lines


def unigram_entropy(dataset) -> tuple[float, int] | None:
    """Return (entropy in nats of the split's token frequencies, number of tokens counted).

    It is the loss of the best model that ignores the context. Each dataset of a blend counts by its
    share of the samples. None for mock data and for no data.
    """
    if dataset is None or any(source.config.mock for source, _ in datasets_of_blend(dataset)):
        return None
    frequencies = numpy.zeros(0)
    tokens = 0
    for gpt_dataset, share in datasets_of_blend(dataset):
        counts = _token_counts(gpt_dataset)
        size = max(len(counts), len(frequencies))
        frequencies = numpy.pad(frequencies, (0, size - len(frequencies)))
        frequencies[: len(counts)] += share * counts / counts.sum()
        tokens += int(counts.sum())
    present = frequencies[frequencies > 0]
    return float(-(present * numpy.log(present)).sum()), tokens


def _token_counts(gpt_dataset) -> numpy.ndarray:
    counts = numpy.zeros(0, numpy.int64)
    for start in range(0, len(gpt_dataset.indices), DOCUMENTS_AT_ONCE):
        indices = gpt_dataset.indices[start : start + DOCUMENTS_AT_ONCE]
        documents = [gpt_dataset.dataset.get(int(i)) for i in indices]
        block_counts = numpy.bincount(numpy.concatenate(documents), minlength=len(counts))
        block_counts[: len(counts)] += counts
        counts = block_counts
    return counts
