"""Text to tokens: reads a source, writes Megatron-Core's .bin and .idx and a JSON description of them.

The rule it keeps: what lies under the final names is complete, and every document of the source is either in it or
counted and named. Order and bytes of the output depend on the source and the tokenizer alone, not on the workers.
"""

import collections
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from mixtrain.data.progress import Progress
from mixtrain.data.sources import Item, Unreadable
from mixtrain.data.tokenizer import (
    load_tokenizer,
    special_pattern,
    tokenizer_eod_id,
    tokenizer_sha256,
    tokenizer_vocab_size,
    train_bpe,
)
from mixtrain.errors import UserError

NAMED = 10  # empty or unreadable documents that are printed by name; all of them are counted
CHUNK_ITEMS, CHUNK_BYTES = 256, 1 << 20  # what a worker is given at a time, at most (but a single item may be larger)


@dataclass
class Chunk:
    """What a worker makes of some items: token ids of the documents that survived, and what was wrong with the rest."""

    ids: numpy.ndarray = field(default_factory=lambda: numpy.empty(0, numpy.int32))  # of all documents, one by one
    lengths: list[int] = field(default_factory=list)  # tokens per document, the end-of-document token included
    empty: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    spelled: list[str] = field(default_factory=list)  # texts that spell a special token: which, and where
    size: int = 0  # of the input, in the unit of its source


def preprocess(
    source, prefix: Path, tokenizer_dir: Path | None = None, *, train_vocab_size: int | None = None,
    workers: int = 1, overwrite: bool = False, parse_special_tokens: bool = False, log=None,
) -> dict:  # fmt: skip
    """Write PREFIX.bin, PREFIX.idx and PREFIX.json from a source (see sources.py); return what the last one holds.

    Either `tokenizer_dir` is given, or a byte-level BPE of `train_vocab_size` tokens is trained on the source
    and written to PREFIX-tokenizer. `workers` = 1 tokenizes in this process. With `parse_special_tokens` a special
    token that a text spells is that token, else its pieces. Raises UserError.
    """
    prefix = Path(prefix)
    if (tokenizer_dir is None) == (train_vocab_size is None):
        raise UserError("give either a tokenizer directory or the vocabulary size of one to train")
    if workers < 1:
        raise UserError(f"--workers = {workers} is less than one process; use 1 or more")
    trained_dir = prefix.with_name(prefix.name + "-tokenizer") if tokenizer_dir is None else None
    _refuse_existing(prefix, trained_dir, overwrite)
    partial = _make_partial(prefix)
    try:
        if trained_dir is not None:
            with Progress("training the tokenizer", source.total(), source.unit, log) as progress:
                train_bpe(_texts(source, progress), train_vocab_size, partial / "tokenizer")
        facts = _write(
            source, partial / "data", tokenizer_dir or partial / "tokenizer", workers, log, parse_special_tokens
        )
        # relative, so that data and tokenizer may move together
        facts["tokenizer"] = os.path.relpath(trained_dir or tokenizer_dir, prefix.parent)
        (partial / "data.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        _publish(partial, prefix, trained_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _refuse_existing(prefix: Path, trained_dir: Path | None, overwrite: bool) -> None:
    outputs = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")]
    outputs += [trained_dir] if trained_dir is not None else []
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists already; give another prefix, or --overwrite to replace it")
    if trained_dir is not None and trained_dir.exists() and not (trained_dir / "tokenizer.json").is_file():
        raise UserError(f"{trained_dir} is no tokenizer directory, so it is not replaced; give another prefix")


def _make_partial(prefix: Path) -> Path:
    """A directory of this run's own beside the output, on the same file system, for files that are not complete."""
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{prefix.name}.partial-", dir=prefix.parent))
    except OSError as error:
        raise UserError(f"{prefix.parent}: cannot write there: {error.strerror}") from error


def _texts(source, progress: Progress) -> Iterator[str]:
    """The texts a tokenizer is trained on; what cannot be read is named by the pass that tokenizes."""
    for item in source.items():
        progress.advance(item.size)
        try:
            yield item.text()
        except Unreadable:
            continue


def _publish(partial: Path, prefix: Path, trained_dir: Path | None) -> None:
    """Move finished files to their names, .idx last: no reader takes a .bin without it for a data set."""
    for suffix in (".idx", ".json"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    if trained_dir is not None:
        shutil.rmtree(trained_dir, ignore_errors=True)
        os.replace(partial / "tokenizer", trained_dir)
    for suffix in (".bin", ".json", ".idx"):
        os.replace(partial / f"data{suffix}", f"{prefix}{suffix}")


def _write(source, prefix: Path, tokenizer_dir: Path, workers: int, log, parse: bool) -> dict:
    """Tokenize every item into prefix.bin and prefix.idx, and return their description."""
    vocab_size, eod_id = tokenizer_vocab_size(tokenizer_dir), tokenizer_eod_id(tokenizer_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing GPU libraries, which have no part in this
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # seconds, and torch with it

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    facts = {"documents": 0, "tokens": 0, "empty": 0, "unreadable": 0, "max_token_id": 0}
    facts |= {"parse_special_tokens": parse, "spell_special_tokens": 0}  # whether, and how many texts do
    first = None
    with Progress("tokenizing", source.total(), source.unit, log) as progress:
        for chunk in _tokenized(source, (tokenizer_dir, eod_id, parse), workers):
            _name_lost(chunk, facts, progress)
            first = first or next(iter(chunk.spelled), None)
            facts["spell_special_tokens"] += len(chunk.spelled)
            _add(chunk, facts, builder)
            progress.advance(chunk.size, f"{facts['documents']:,} documents, {facts['tokens']:,} tokens")
        if first:
            progress.complain(spelled_words(facts["spell_special_tokens"], first, parse))
    builder.finalize(f"{prefix}.idx")
    if not facts["documents"]:
        raise UserError(
            f"no document survived: {facts['empty']} of them empty, {facts['unreadable']} unreadable; "
            "look at the lines above, the format and the key or column"
        )
    with open(f"{prefix}.bin", "rb") as stream:
        bin_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    facts |= {"vocab_size": vocab_size, "eod_id": eod_id, "dtype": dtype.__name__, "bin_sha256": bin_sha256}
    return {**facts, "tokenizer_sha256": tokenizer_sha256(tokenizer_dir)}


def _name_lost(chunk: Chunk, facts: dict, progress: Progress) -> None:
    """Count the chunk's empty and unreadable documents, and name the first of the whole run."""
    named = facts["empty"] + facts["unreadable"]
    lost = chunk.empty + chunk.unreadable
    for line in lost[: max(0, NAMED - named)]:
        progress.complain(line)
    if named <= NAMED < named + len(lost):
        progress.complain("more documents are empty or unreadable; they are counted, not named")
    facts["empty"] += len(chunk.empty)
    facts["unreadable"] += len(chunk.unreadable)


def spelled_words(texts: int, first: str, parse: bool) -> str:
    """What is said of texts that spell a special token."""
    what = f"{texts:,} text{' spells' if texts == 1 else 's spell'} a special token (first: {first})"
    return (
        f"{what}, and it is one" if parse else f"{what}, which stayed text; --parse-special-tokens makes it the token"
    )


def _add(chunk: Chunk, facts: dict, builder) -> None:
    """Append the chunk's documents to the .bin."""
    offset = 0
    for length in chunk.lengths:
        builder.add_document(chunk.ids[offset : offset + length], [length])
        offset += length
    facts["documents"] += len(chunk.lengths)
    facts["tokens"] += offset
    facts["max_token_id"] = max(facts["max_token_id"], int(chunk.ids.max(initial=0)))


def _chunks(source) -> Iterator[list[Item]]:
    chunk, size = [], 0
    for item in source.items():
        chunk.append(item)
        size += len(item.content) if isinstance(item.content, str) else item.size
        if len(chunk) >= CHUNK_ITEMS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenized(source, how: tuple[Path, int, bool], workers: int) -> Iterator[Chunk]:
    """Chunks in the order of the source, tokenized here or by worker processes."""
    if workers == 1:
        _start_worker(*how)
        yield from map(_tokenize, _chunks(source))
        return
    # spawn, not fork: the caller may hold threads (torch, gloo) whose locks a forked child would find taken for ever
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque[Future] = collections.deque()
    with ProcessPoolExecutor(workers, context, _start_process, how) as pool:
        try:
            for chunk in _chunks(source):
                waiting.append(pool.submit(_tokenize, chunk))
                if len(waiting) >= 4 * workers:  # bounds what is in memory, however large the source
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict = {}  # this process's tokenizer, end-of-document id, and the pattern of special tokens


def _start_process(tokenizer_dir: Path, eod_id: int, parse: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what there is to say about Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: the workers are the parallelism
    _start_worker(tokenizer_dir, eod_id, parse)


def _start_worker(tokenizer_dir: Path, eod_id: int, parse: bool) -> None:
    tokenizer = load_tokenizer(tokenizer_dir, parse)
    _worker.update(tokenizer=tokenizer, eod_id=eod_id, special=special_pattern(tokenizer))


def _tokenize(items: list[Item]) -> Chunk:
    chunk, texts = Chunk(), []
    for item in items:
        chunk.size += item.size
        try:
            text = item.text()
        except Unreadable as error:
            chunk.unreadable.append(f"{item.name}: {error}")
            continue
        if text.strip():
            texts.append(text)
            if found := _worker["special"].search(text):
                chunk.spelled.append(f"`{found[0]}` in {item.name}")
        else:
            chunk.empty.append(f"{item.name}: empty")
    if texts:
        encodings = _worker["tokenizer"].encode_batch_fast(texts, add_special_tokens=False)
        documents = [numpy.array([*encoding.ids, _worker["eod_id"]], numpy.int32) for encoding in encodings]
        chunk.lengths = [len(document) for document in documents]
        chunk.ids = numpy.concatenate(documents)
    return chunk
