"""Tokenizes a source into Megatron-Core's .bin and .idx, with a JSON description.

Rule: files under the final names are complete. Every document of the source is either in the output
or counted as skipped. Order and bytes of the output depend only on the source and the tokenizer,
not on the number of workers.
"""

import collections
import json
import multiprocessing
import os
import shutil
import signal
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy

from mixtrain.data.documents import Document, UnreadableDocument
from mixtrain.data.progress import PreprocessProgress
from mixtrain.data.skipped_documents import SkippedDocuments
from mixtrain.data.spelled_special_tokens import SpelledSpecialTokens
from mixtrain.data.tokenizer import (
    load_tokenizer,
    special_pattern,
    tokenizer_eod_id,
    tokenizer_sha256,
    tokenizer_vocab_size,
    train_bpe,
)
from mixtrain.data.writer import IndexedDatasetWriter
from mixtrain.errors import Fault, UserError
from mixtrain.system import partial
from mixtrain.system.rank_identity import die_with

# in PREFIX.writing, the directory of incomplete output
WRITTEN = {"data.bin", "data.idx", "data.json", "tokenizer"}


class TokenizeSettings(NamedTuple):
    tokenizer_dir: Path
    eod_id: int
    parse_special_tokens: bool


@dataclass
class TokenizedBlock:
    """A worker's result for one block: token ids of its documents, and the skipped documents."""

    size: int = 0  # of the input, in the unit of its source
    # of all documents, one after the other
    ids: numpy.ndarray = field(default_factory=lambda: numpy.empty(0, numpy.int32))
    # tokens per document, including the end-of-document token
    lengths: array = field(default_factory=lambda: array("i"))
    skipped: SkippedDocuments = field(default_factory=SkippedDocuments)
    spelled: SpelledSpecialTokens = field(default_factory=SpelledSpecialTokens)


def preprocess(
    source, prefix: Path, tokenizer_dir: Path | None = None, *,
    train_vocab_size: int | None = None, workers: int = 1, overwrite: bool = False,
    max_unreadable: float | None = None, parse_special_tokens: bool = False, log=None,
) -> dict:  # fmt: skip
    """Write PREFIX.bin, .idx and .json from a source (see sources.py); return the JSON's content.

    Without `tokenizer_dir`, trains a byte-level BPE of `train_vocab_size` tokens on the source and
    writes it to PREFIX-tokenizer. `workers` = 1 tokenizes in this process. `max_unreadable` is the
    share of documents that may be unreadable (default: skipped_documents.py). With
    `parse_special_tokens` a special token that a text spells becomes that token, otherwise it stays
    text. Raises UserError, and Fault for a write error or a killed worker.
    """
    prefix = Path(prefix)
    if (tokenizer_dir is None) == (train_vocab_size is None):
        raise UserError("give either a tokenizer directory or the vocabulary size of one to train")
    if workers < 1:
        raise UserError(f"--workers = {workers} is less than one process; use 1 or more")
    trained_dir = prefix.with_name(prefix.name + "-tokenizer") if tokenizer_dir is None else None
    _refuse_existing(prefix, trained_dir, overwrite)
    writing = prefix.with_name(prefix.name + ".writing")
    new_directories = partial.make(writing)
    with partial.claim(writing, "run"):
        partial.clear(writing, WRITTEN)
        try:
            if trained_dir is not None:
                activity = "training the tokenizer"
                with PreprocessProgress(activity, source.total(), source.unit, log) as progress:
                    train_bpe(_texts(source, progress), train_vocab_size, writing / "tokenizer")
            directory = tokenizer_dir or writing / "tokenizer"
            settings = TokenizeSettings(
                directory, tokenizer_eod_id(directory), parse_special_tokens
            )
            description = _write(source, writing / "data", settings, workers, max_unreadable, log)
            # relative, so that data and tokenizer can be moved together
            description["tokenizer"] = os.path.relpath(trained_dir or tokenizer_dir, prefix.parent)
            text = json.dumps(description, indent=2) + "\n"
            (writing / "data.json").write_text(text, encoding="utf-8")
            _publish(writing, prefix, trained_dir)
        except OSError as error:
            raise Fault(partial.failure_message(prefix, writing, error)) from error
        except BrokenProcessPool:
            raise Fault(
                "a worker was killed, perhaps because memory ran out; nothing was written"
            ) from None
        finally:
            partial.remove(new_directories or [writing])
    return description


def _refuse_existing(prefix: Path, trained_dir: Path | None, overwrite: bool) -> None:
    outputs = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")]
    outputs += [trained_dir] if trained_dir is not None else []
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} exists already; give another prefix, or --overwrite to replace it"
        )
    if trained_dir is None or not trained_dir.exists():
        return
    if not (trained_dir / "tokenizer.json").is_file():
        raise UserError(
            f"{trained_dir} is not a tokenizer directory, so it is not replaced; give another"
            " prefix"
        )


def _texts(source, progress: PreprocessProgress) -> Iterator[str]:
    """Yield the texts to train a tokenizer on; the later pass reports unreadable documents."""
    for block in source.blocks():
        for document in block:
            try:
                yield document.text()
            except UnreadableDocument:
                continue
        progress.advance(block.size)


def _publish(writing: Path, prefix: Path, trained_dir: Path | None) -> None:
    """Move the finished files to their final names; .idx last, since readers require it."""
    for suffix in (".idx", ".json"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    if trained_dir is not None:
        shutil.rmtree(trained_dir, ignore_errors=True)
        os.replace(writing / "tokenizer", trained_dir)
    for suffix in (".bin", ".json", ".idx"):
        os.replace(writing / f"data{suffix}", f"{prefix}{suffix}")


def _write(
    source,
    prefix: Path,
    settings: TokenizeSettings,
    workers: int,
    max_unreadable: float | None,
    log,
) -> dict:
    """Tokenize every document into prefix.bin and prefix.idx, and return their description."""
    vocab_size = tokenizer_vocab_size(settings.tokenizer_dir)
    skipped = SkippedDocuments()
    spelled = SpelledSpecialTokens()
    max_token_id = 0
    with (
        IndexedDatasetWriter(prefix, vocab_size) as writer,
        PreprocessProgress("tokenizing", source.total(), source.unit, log) as progress,
    ):
        for block in _tokenized(source, settings, workers):
            skipped.add(block.skipped, progress)
            spelled.add(block.spelled)
            writer.add(block.ids, block.lengths)
            max_token_id = max(max_token_id, int(block.ids.max(initial=0)))
            progress.advance(
                block.size, f"{writer.documents:,} documents, {writer.tokens:,} tokens"
            )
        if spelled.texts:
            progress.complain(spelled.message(settings.parse_special_tokens))
        if not writer.documents:
            raise UserError(
                f"no document survived: {skipped.empty} of them empty, {skipped.unreadable}"
                " unreadable; look at the lines above, the format and the key or column"
            )
        skipped.refuse_too_many(writer.documents, max_unreadable)
        bin_sha256 = writer.finish()
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "empty": skipped.empty,
        "unreadable": skipped.unreadable,
        "max_token_id": max_token_id,
        "parse_special_tokens": settings.parse_special_tokens,
        "spell_special_tokens": spelled.texts,
        "vocab_size": vocab_size,
        "eod_id": settings.eod_id,
        "dtype": writer.dtype.__name__,
        "bin_sha256": bin_sha256,
        "tokenizer_sha256": tokenizer_sha256(settings.tokenizer_dir),
    }


def _tokenized(source, settings: TokenizeSettings, workers: int) -> Iterator[TokenizedBlock]:
    """Yield blocks in the order of the source, tokenized here or by worker processes."""
    if workers == 1:
        _start_worker(settings)
        yield from map(_tokenize, source.blocks())
        return
    # spawn, not fork: the caller may have threads (torch, gloo), and a forked child would inherit
    # their locks in the locked state
    context = multiprocessing.get_context("spawn")
    pending: collections.deque[Future] = collections.deque()
    with ProcessPoolExecutor(workers, context, _start_process, (os.getpid(), settings)) as pool:
        try:
            for block in source.blocks():
                pending.append(pool.submit(_tokenize, block))
                if len(pending) >= 4 * workers:  # bounds memory for sources of any size
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict = {}  # this process's tokenizer, end-of-document id and pattern of special tokens


def _start_process(parent: int, settings: TokenizeSettings) -> None:
    # Slurm and Ctrl-C signal every process; only the parent handles it and ends the workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker process
    _start_worker(settings)


def _start_worker(settings: TokenizeSettings) -> None:
    tokenizer = load_tokenizer(settings.tokenizer_dir, settings.parse_special_tokens)
    _worker.update(tokenizer=tokenizer, eod_id=settings.eod_id, special=special_pattern(tokenizer))


def _tokenize(documents: Iterable[Document]) -> TokenizedBlock:
    """Tokenize a block of documents (a DocumentBlock or a LineBlock)."""
    block = TokenizedBlock(documents.size)
    texts = []
    for document in documents:
        try:
            text = document.text()
        except UnreadableDocument as error:
            block.skipped.add_unreadable(document.name, error)
            continue
        if not text.strip():
            block.skipped.add_empty(document.name)
            continue
        texts.append(text)
        if match := _worker["special"].search(text):
            block.spelled.add_text(match[0], document.name)
    if texts:
        ids: list[int] = []
        for encoding in _worker["tokenizer"].encode_batch_fast(texts, add_special_tokens=False):
            document_ids = encoding.ids
            ids += document_ids
            ids.append(_worker["eod_id"])
            block.lengths.append(len(document_ids) + 1)
        block.ids = numpy.array(ids, numpy.int32)
    return block
