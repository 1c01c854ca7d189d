"""Text to tokens: reads a source, writes Megatron-Core's .bin and .idx and a JSON description of them.

The rule it keeps: what lies under the final names is complete, and every document of the source is either in it or
counted and named. Order and bytes of the output depend on the source and the tokenizer alone, not on the workers.
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

from mixtrain.data.items import Item, Unreadable
from mixtrain.data.lost import Lost
from mixtrain.data.progress import Progress
from mixtrain.data.spelled import Spelled
from mixtrain.data.tokenizer import (
    load_tokenizer,
    special_pattern,
    tokenizer_eod_id,
    tokenizer_sha256,
    tokenizer_vocab_size,
    train_bpe,
)
from mixtrain.data.writer import Writer
from mixtrain.errors import Fault, UserError
from mixtrain.system import partial
from mixtrain.system.rank_identity import die_with

# in the directory of what is not complete
WRITTEN = {"data.bin", "data.idx", "data.json", "tokenizer"}


class How(NamedTuple):
    """How a text becomes tokens."""

    tokenizer: Path  # a directory
    eod_id: int
    parse_special_tokens: bool


@dataclass
class Chunk:
    """What a worker makes of some items: token ids of the documents that survived, and what was wrong with the rest."""

    size: int = 0  # of the input, in the unit of its source
    # of all documents, one by one
    ids: numpy.ndarray = field(default_factory=lambda: numpy.empty(0, numpy.int32))
    # tokens per document, the end-of-document one included
    lengths: array = field(default_factory=lambda: array("i"))
    lost: Lost = field(default_factory=Lost)
    spelled: Spelled = field(default_factory=Spelled)


def preprocess(
    source, prefix: Path, tokenizer_dir: Path | None = None, *, train_vocab_size: int | None = None,
    workers: int = 1, overwrite: bool = False, max_unreadable: float | None = None, parse_special_tokens: bool = False,
    log=None,
) -> dict:  # fmt: skip
    """Write PREFIX.bin, PREFIX.idx and PREFIX.json from a source (see sources.py); return what the last one holds.

    Either `tokenizer_dir` is given, or a byte-level BPE of `train_vocab_size` tokens is trained on the source
    and written to PREFIX-tokenizer. `workers` = 1 tokenizes in this process. `max_unreadable` is the share of the items
    that may be unreadable (lost.py has the default). With `parse_special_tokens` a special token that a text spells is
    that token, else its pieces. Raises UserError, and Fault if the disk is full.
    """
    prefix = Path(prefix)
    if (tokenizer_dir is None) == (train_vocab_size is None):
        raise UserError("give either a tokenizer directory or the vocabulary size of one to train")
    if workers < 1:
        raise UserError(f"--workers = {workers} is less than one process; use 1 or more")
    trained_dir = prefix.with_name(prefix.name + "-tokenizer") if tokenizer_dir is None else None
    _refuse_existing(prefix, trained_dir, overwrite)
    writing = prefix.with_name(prefix.name + ".writing")
    made = partial.make(writing)
    with partial.claim(writing, "run"):
        partial.clear(writing, WRITTEN)
        try:
            if trained_dir is not None:
                with Progress(
                    "training the tokenizer", source.total(), source.unit, log
                ) as progress:
                    train_bpe(_texts(source, progress), train_vocab_size, writing / "tokenizer")
            from_dir = tokenizer_dir or writing / "tokenizer"
            how = How(from_dir, tokenizer_eod_id(from_dir), parse_special_tokens)
            facts = _write(source, writing / "data", how, workers, max_unreadable, log)
            # relative, so that data and tokenizer may move together
            facts["tokenizer"] = os.path.relpath(trained_dir or tokenizer_dir, prefix.parent)
            (writing / "data.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            _publish(writing, prefix, trained_dir)
        except OSError as error:
            raise Fault(partial.failure_message(prefix, writing, error)) from error
        except BrokenProcessPool:
            raise Fault(
                "a worker was killed, perhaps for want of memory; nothing was written"
            ) from None
        finally:
            partial.remove(made or [writing])
    return facts


def _refuse_existing(prefix: Path, trained_dir: Path | None, overwrite: bool) -> None:
    outputs = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")]
    outputs += [trained_dir] if trained_dir is not None else []
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} exists already; give another prefix, or --overwrite to replace it"
        )
    if (
        trained_dir is not None
        and trained_dir.exists()
        and not (trained_dir / "tokenizer.json").is_file()
    ):
        raise UserError(
            f"{trained_dir} is no tokenizer directory, so it is not replaced; give another prefix"
        )


def _texts(source, progress: Progress) -> Iterator[str]:
    """The texts a tokenizer is trained on; what cannot be read is named by the pass that tokenizes."""
    for block in source.blocks():
        for item in block:
            try:
                yield item.text()
            except Unreadable:
                continue
        progress.advance(block.size)


def _publish(writing: Path, prefix: Path, trained_dir: Path | None) -> None:
    """Move finished files to their names, .idx last: no reader takes a .bin without it for a data set."""
    for suffix in (".idx", ".json"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    if trained_dir is not None:
        shutil.rmtree(trained_dir, ignore_errors=True)
        os.replace(writing / "tokenizer", trained_dir)
    for suffix in (".bin", ".json", ".idx"):
        os.replace(writing / f"data{suffix}", f"{prefix}{suffix}")


def _write(source, prefix: Path, how: How, workers: int, max_unreadable: float | None, log) -> dict:
    """Tokenize every item into prefix.bin and prefix.idx, and return their description."""
    vocab_size = tokenizer_vocab_size(how.tokenizer)
    lost = Lost()
    spelled = Spelled()
    facts = {"documents": 0, "tokens": 0, "empty": 0, "unreadable": 0, "max_token_id": 0}
    with (
        Writer(prefix, vocab_size) as writer,
        Progress("tokenizing", source.total(), source.unit, log) as progress,
    ):
        for chunk in _tokenized(source, how, workers):
            lost.add(chunk.lost, progress)
            spelled.join(chunk.spelled)
            writer.add(chunk.ids, chunk.lengths)
            facts["max_token_id"] = max(facts["max_token_id"], int(chunk.ids.max(initial=0)))
            progress.advance(
                chunk.size, f"{writer.documents:,} documents, {writer.tokens:,} tokens"
            )
        if spelled.texts:
            progress.complain(spelled.words(how.parse_special_tokens))
        facts |= {"documents": writer.documents, "tokens": writer.tokens}
        facts |= {"empty": lost.empty, "unreadable": lost.unreadable}
        if not writer.documents:
            raise UserError(
                f"no document survived: {lost.empty} of them empty, {lost.unreadable} unreadable; "
                "look at the lines above, the format and the key or column"
            )
        lost.refuse_too_many(writer.documents, max_unreadable)
        bin_sha256 = writer.finish()
    facts |= {
        "parse_special_tokens": how.parse_special_tokens,
        "spell_special_tokens": spelled.texts,
    }
    facts |= {
        "vocab_size": vocab_size,
        "eod_id": how.eod_id,
        "dtype": writer.dtype.__name__,
        "bin_sha256": bin_sha256,
    }
    return {**facts, "tokenizer_sha256": tokenizer_sha256(how.tokenizer)}


def _tokenized(source, how: How, workers: int) -> Iterator[Chunk]:
    """Chunks in the order of the source, tokenized here or by worker processes."""
    if workers == 1:
        _start_worker(how)
        yield from map(_tokenize, source.blocks())
        return
    # spawn, not fork: the caller may hold threads (torch, gloo) whose locks a forked child would
    # find taken for ever
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque[Future] = collections.deque()
    with ProcessPoolExecutor(workers, context, _start_process, (os.getpid(), how)) as pool:
        try:
            for block in source.blocks():
                waiting.append(pool.submit(_tokenize, block))
                # bounds what is in memory, however large the source
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict = {}  # this process's tokenizer, end-of-document id and pattern of special tokens


def _start_process(parent: int, how: How) -> None:
    # Slurm sends it to every process: the parent ends the workers,
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # and says what there is to say about Ctrl-C
    die_with(parent)
    # one thread a worker: the workers are the parallelism
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _start_worker(how)


def _start_worker(how: How) -> None:
    tokenizer = load_tokenizer(how.tokenizer, how.parse_special_tokens)
    _worker.update(tokenizer=tokenizer, eod_id=how.eod_id, special=special_pattern(tokenizer))


def _tokenize(items: Iterable[Item]) -> Chunk:
    """The tokens of a block's documents (see items.py)."""
    chunk = Chunk(items.size)
    texts = []
    for item in items:
        try:
            text = item.text()
        except Unreadable as error:
            chunk.lost.add_unreadable(item.name, error)
            continue
        if text.strip():
            texts.append(text)
            if found := _worker["special"].search(text):
                chunk.spelled.add(found[0], item.name)
        else:
            chunk.lost.add_empty(item.name)
    if texts:
        ids: list[int] = []
        for encoding in _worker["tokenizer"].encode_batch_fast(texts, add_special_tokens=False):
            document = encoding.ids
            ids += document
            ids.append(_worker["eod_id"])
            chunk.lengths.append(len(document) + 1)
        chunk.ids = numpy.array(ids, numpy.int32)
    return chunk
