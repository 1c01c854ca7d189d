"""Megatron-Core's data sets, built for a run, and what is worth knowing about them.

The rule it keeps: every sample comes from Megatron's own GPTDataset by way of its builder; what its
builder would hang on or accept in silence (an empty split, a short blend, an index of other data)
is refused here first.
"""

import contextlib
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from mixtrain.config.data_blend import parse_blend
from mixtrain.data.check import SPLITS, check_files
from mixtrain.data.index import HEADER, read_index
from mixtrain.data.tokenizer import tokenizer_eod_id, tokenizer_sha256, tokenizer_vocab_size
from mixtrain.errors import UserError

DOCUMENTS_AT_ONCE = 1024  # read together when tokens are counted


@dataclass(frozen=True)
class TokenizerFacts:
    """All that a GPTDataset asks of a tokenizer.

    Not Megatron's own tokenizer object: with that, a GPTDataset masks the loss of every token equal
    to the padding token (for many published tokenizers a real one), and where the first sample it
    reads holds one, at that place in every later sample too, because the mask it caches is the one
    it changes. Our data holds no padding.
    """

    vocab_size: int
    eod: int
    name: str

    @property
    def unique_identifiers(self) -> OrderedDict:
        """Goes into the name of the cached sample index."""
        return OrderedDict(name=self.name, vocab_size=self.vocab_size, eod=self.eod)


def build(
    kind: str, *, data_path: list[str] | None, split: str, seq_length: int, seed: int, train_samples: int,
    valid_samples: int, test_samples: int, tokenizer_dir: Path | None, vocab_size: int, path_to_cache: Path | None,
    log=print,
):  # fmt: skip
    """The (train, valid, test) data sets, each with at least the samples asked for, or None where that is 0.

    A sample is a dict of CPU tensors tokens, labels, loss_mask, position_ids [seq_length]. To be called on every rank:
    rank 0 writes the sample index into path_to_cache, the others read it. kind "mock" is Megatron's counting data
    (it ignores data_path, split and tokenizer_dir), "indexed" reads .bin and .idx files. Raises UserError.
    """
    samples = (train_samples, valid_samples, test_samples)
    if kind == "mock":
        tokenizer = TokenizerFacts(vocab_size, vocab_size - 1, "mock")
        config = _config(None, None, seq_length, seed, tokenizer, path_to_cache)
    elif kind == "indexed":
        problems = check_files(
            data_path,
            tokenizer_dir,
            vocab_size,
            split,
            samples,
            seq_length=seq_length,
            every_entry=_rank() == 0,
        )
        if problems := first_of_all_ranks(problems):
            raise UserError(*problems)
        tokenizer = TokenizerFacts(
            tokenizer_vocab_size(tokenizer_dir),
            tokenizer_eod_id(tokenizer_dir),
            tokenizer_sha256(tokenizer_dir),
        )
        config = _config(
            data_path, split, seq_length, seed, tokenizer, _index_cache(data_path, path_to_cache)
        )
    else:
        raise UserError(f"data.kind = {kind} is not mock or indexed")
    datasets = _build(config, samples)
    for name, wanted, dataset in zip(SPLITS, samples, datasets, strict=True):
        if dataset is not None:
            _require(dataset, name, wanted)
            for line in _describe(dataset, name, wanted, seq_length):
                if _rank() == 0:
                    log(line)
    return tuple(datasets)


def first_of_all_ranks(problems: list[str]) -> list[str]:
    """The problems of the first rank that has any: every rank stops at what one of them has found."""
    if not torch.distributed.is_initialized():
        return problems
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, problems)
    return next((these for these in found if these), [])


def _config(data_path, split, seq_length: int, seed: int, tokenizer: TokenizerFacts, path_to_cache):
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
        create_attention_mask=False,  # attention knows that it is causal
    )


def _index_cache(data_path: list[str], path_to_cache: Path | None) -> Path:
    """Where the sample index of exactly these documents belongs.

    Megatron names a cached index by path, seed, split and number of samples, and not by what the
    files hold: without the directory below, data made anew under an old name would be read through
    the index of the old data. The index depends on the lengths of the documents alone, so they are
    what is hashed, by one rank for all.
    """
    prefixes, _ = parse_blend(data_path)
    name = [None]
    if _rank() == 0:
        digest = hashlib.sha256()
        for prefix in prefixes:
            lengths = HEADER.size + 4 * read_index(prefix).sequences
            digest.update(numpy.memmap(f"{prefix}.idx", mode="r")[:lengths])
        name = [digest.hexdigest()[:12]]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(name, src=0)
    home = (
        Path(path_to_cache)
        if path_to_cache is not None
        else Path(prefixes[0]).parent / "index_cache"
    )
    return home / name[0]


def _build(config, samples: tuple[int, int, int]) -> list:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

    for i, wanted in enumerate(samples):
        if not wanted:
            config.split_matrix[i] = None  # the builder's word for a split that is not to be built
    cls = MockGPTDataset if config.mock else GPTDataset
    try:
        with _process_group_for(config):
            return BlendedMegatronDatasetBuilder(cls, list(samples), lambda: True, config).build()
    except Exception as error:
        root = error  # the builder wraps it, twice where the data is mock
        while root.__cause__:
            root = root.__cause__
        if isinstance(root, (ValueError, EOFError)):  # what numpy.load says of a file cut short
            raise UserError(
                f"{config.path_to_cache}: a sample index there cannot be read ({root}), as after a"
                " run that was killed while it wrote it; remove the directory, it is made again"
            ) from error
        if not isinstance(root, OSError):
            raise
        raise UserError(
            f"data.path_to_cache: the sample index cannot be written or read ({root}); "
            "give a directory that can be written and that every rank reaches"
        ) from error


@contextlib.contextmanager
def _process_group_for(config):
    """A group of one process, where there is none and a blend is built: megatron-core 0.16 asks for the rank there."""
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


def _require(dataset, name: str, wanted: int) -> None:
    if len(dataset) < wanted:  # a blend without weights reads each part once at most
        raise UserError(
            "data.data_path without weights reads each data set once at most, which gives"
            f" {len(dataset)} {name} samples, but {wanted} are wanted; give every prefix a weight,"
            " and they repeat"
        )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def parts_of(dataset) -> list[tuple[object, float]]:
    """The GPTDatasets of a data set and the share of its samples that each one gives."""
    if not hasattr(dataset, "datasets"):
        return [(dataset, 1.0)]
    total = sum(dataset.weights)
    return [
        (part, weight / total)
        for part, weight in zip(dataset.datasets, dataset.weights, strict=True)
    ]


def _parts(data) -> str:
    """What the entries of a part's data are: Megatron's own tool may have written several sequences a document."""
    bounds = getattr(data, "document_indices", None)  # mock data have none
    return (
        "documents"
        if bounds is None or len(bounds) - 1 == len(data.sequence_lengths)
        else "sequences"
    )


def _describe(dataset, name: str, wanted: int, seq_length: int) -> list[str]:
    """One line per part: how much text there is, and how often it will be read; a warning where that is above once."""
    lines = []
    for part, share in parts_of(dataset):
        tokens = int(part.dataset.sequence_lengths[part.indices].sum())
        samples = round(wanted * share)
        source = f" of {Path(part.dataset_path).name}" if part.dataset_path else ""
        epochs = samples * seq_length / tokens
        lines.append(
            f"data: {name}: {samples:,} samples of {seq_length:,} tokens from"
            f" {len(part.indices):,} {_parts(part.dataset)}{source}, {tokens:,} tokens:"
            f" {epochs:.3g} epochs"
        )
        if epochs > 1 and not part.config.mock:
            lines.append(
                f"warning: data: {name}: the same {tokens:,} tokens{source} are read {epochs:.3g}"
                f" times; {tokens // seq_length:,} samples are one epoch"
            )
    return lines


def unigram_entropy(dataset) -> tuple[float, int] | None:
    """Entropy in nats of the token frequencies over this split's documents, and how many tokens those are.

    It is the loss of the best model that ignores the context. The parts of a blend count by their share of its samples.
    None for mock data and for no data.
    """
    if dataset is None or any(part.config.mock for part, _ in parts_of(dataset)):
        return None
    frequencies = numpy.zeros(0)
    tokens = 0
    for part, share in parts_of(dataset):
        counts = _token_counts(part)
        size = max(len(counts), len(frequencies))
        frequencies = numpy.pad(frequencies, (0, size - len(frequencies)))
        frequencies[: len(counts)] += share * counts / counts.sum()
        tokens += int(counts.sum())
    present = frequencies[frequencies > 0]
    return float(-(present * numpy.log(present)).sum()), tokens


def _token_counts(part) -> numpy.ndarray:
    counts = numpy.zeros(0, numpy.int64)
    for start in range(0, len(part.indices), DOCUMENTS_AT_ONCE):
        documents = [
            part.dataset.get(int(i)) for i in part.indices[start : start + DOCUMENTS_AT_ONCE]
        ]
        more = numpy.bincount(numpy.concatenate(documents), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return counts
