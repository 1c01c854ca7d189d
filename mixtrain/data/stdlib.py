"""The default corpus: documentation and sources that are part of every Python installation.

Rule: this module fixes the files and their order and hashes their content, so two runs that print
the same sha256 were trained on the same text. Nothing is downloaded.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from mixtrain.data.preprocess import preprocess
from mixtrain.data.sources import Files
from mixtrain.errors import UserError
from mixtrain.system import untrusted_json
from mixtrain.system.locks import holder, open_lock, sign
from mixtrain.system.untrusted_json import Count

# Files of Python 3.11, 3.12 and 3.13: none from packages that distributions split off (tkinter,
# venv, tests), none that is generated, a table, or announced for removal. pydoc_data/topics.py is
# the language reference, a seventh of the corpus; the other files are modules.
NAMES = """
    _collections_abc.py _pydecimal.py _threading_local.py _weakrefset.py abc.py argparse.py ast.py
    asyncio/base_events.py asyncio/events.py asyncio/futures.py asyncio/locks.py
    asyncio/protocols.py asyncio/queues.py asyncio/runners.py asyncio/selector_events.py
    asyncio/sslproto.py asyncio/staggered.py asyncio/streams.py asyncio/subprocess.py
    asyncio/taskgroups.py asyncio/tasks.py asyncio/timeouts.py asyncio/transports.py base64.py
    bdb.py bz2.py calendar.py cmd.py codecs.py collections/__init__.py compileall.py
    concurrent/futures/_base.py concurrent/futures/process.py concurrent/futures/thread.py
    configparser.py contextlib.py copy.py copyreg.py csv.py dataclasses.py difflib.py dis.py
    doctest.py email/_encoded_words.py email/_header_value_parser.py email/_parseaddr.py
    email/_policybase.py email/charset.py email/contentmanager.py email/feedparser.py
    email/generator.py email/header.py email/headerregistry.py email/message.py email/parser.py
    email/policy.py email/quoprimime.py email/utils.py enum.py filecmp.py fileinput.py fnmatch.py
    fractions.py functools.py genericpath.py getpass.py gettext.py glob.py graphlib.py gzip.py
    hashlib.py heapq.py hmac.py html/__init__.py html/parser.py http/__init__.py http/client.py
    http/cookiejar.py http/cookies.py http/server.py inspect.py ipaddress.py json/__init__.py
    json/decoder.py json/encoder.py linecache.py logging/__init__.py logging/config.py
    logging/handlers.py lzma.py mimetypes.py multiprocessing/connection.py
    multiprocessing/context.py multiprocessing/forkserver.py multiprocessing/heap.py
    multiprocessing/managers.py multiprocessing/pool.py multiprocessing/process.py
    multiprocessing/queues.py multiprocessing/reduction.py multiprocessing/resource_tracker.py
    multiprocessing/spawn.py multiprocessing/synchronize.py multiprocessing/util.py ntpath.py
    numbers.py operator.py os.py pdb.py pickle.py pickletools.py posixpath.py pprint.py
    py_compile.py pydoc_data/topics.py queue.py random.py re/__init__.py re/_compiler.py
    re/_parser.py reprlib.py runpy.py sched.py selectors.py shelve.py shlex.py shutil.py socket.py
    socketserver.py statistics.py subprocess.py tarfile.py tempfile.py textwrap.py threading.py
    timeit.py tokenize.py tomllib/_parser.py traceback.py types.py typing.py unittest/async_case.py
    unittest/case.py unittest/loader.py unittest/main.py unittest/mock.py unittest/result.py
    unittest/runner.py unittest/suite.py unittest/util.py urllib/parse.py urllib/request.py
    urllib/robotparser.py uuid.py warnings.py weakref.py zoneinfo/_common.py zoneinfo/_tzpath.py
    zoneinfo/_zoneinfo.py
""".split()
LAYOUT = "1"  # part of the cache key: increase it when the output of prepare() changes


def ordered_names() -> list[str]:
    """Return the files in document order: sorted by the sha256 of their names.

    Megatron splits train, valid and test from the documents in order, so the order determines the
    validation data. With this order, a split of 90,5,5 validates and tests on ordinary modules from
    all over the library (pickle, pdb and asyncio; unittest.mock, shutil and multiprocessing), and
    the only very large file, topics.py, is in train.
    """
    return sorted(NAMES, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def corpus(root: Path | None = None) -> tuple[list[Path], int, str]:
    """Return (files in order, total bytes, sha256 of names and contents).

    `root` is the directory of a standard library, by default this Python's. Raises UserError for a
    missing file.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    size = 0
    files = []
    for name in ordered_names():
        path = root / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; the text of data.kind = stdlib is this Python's"
                " standard library, and this installation lacks a part of it: install that, or use"
                " data.kind = indexed with text of your own"
            ) from error
        digest.update(f"{name} {len(content)}\n".encode() + content)
        size += len(content)
        files.append(path)
    return files, size, digest.hexdigest()


class CorpusDescription(TypedDict):
    """The keys of text.json that are logged."""

    tokens: Count
    vocab_size: Count


def prepare(cache_dir: Path, vocab_size: int, log=print) -> tuple[Path, Path]:
    """Train a tokenizer on the corpus, index it; return (prefix of .bin and .idx, tokenizer dir).

    Both are in cache_dir/stdlib-<hash of corpus and vocabulary size>. Any number of processes may
    call this: one writes, under a lock, and the others wait. The directory gets its final name
    last, so incomplete output of a killed call is never used. Raises UserError.
    """
    files, size, sha256 = corpus()
    key = hashlib.sha256(f"{LAYOUT} {sha256} {vocab_size}".encode()).hexdigest()[:12]
    home = Path(cache_dir) / f"stdlib-{key}"
    if not home.is_dir():  # a reader needs neither the lock nor write permission
        with _locked(home.with_name(home.name + ".lock"), log):
            if not home.is_dir():
                _build(home, files, vocab_size, log)
    description = untrusted_json.read(home / "text.json", CorpusDescription)
    log(f"data: {len(files)} files of the Python standard library, {size:,} bytes, sha256 {sha256}")
    tokens, vocabulary = description["tokens"], description["vocab_size"]
    log(f"data: {tokens:,} tokens, vocabulary {vocabulary:,}, in {home}")
    return home / "text", home / "text-tokenizer"


def _build(home: Path, files: list[Path], vocab_size: int, log) -> None:
    partial = home.with_name(home.name + ".partial")
    # left by a killed call: this process holds the lock, so no other process is writing it
    shutil.rmtree(partial, ignore_errors=True)
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in files]
    # one worker: the tokenizer's own threads need about a second, and a spawned pool would import
    # __main__ again
    preprocess(
        Files(root, names), partial / "text", train_vocab_size=vocab_size, workers=1, log=log
    )
    os.replace(partial, home)


@contextlib.contextmanager
def _locked(path: Path, log) -> Iterator[None]:
    """Hold an exclusive lock on the file; the system releases it whenever the process ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"data: waiting for {holder(descriptor)}, which prepares {path.stem}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write and lock it: {error.strerror}; put the data cache elsewhere"
            " (data.path_to_cache)"
        ) from error
    try:
        with contextlib.suppress(OSError):  # a full disk: the writes under the lock report it
            sign(descriptor)
        yield
    finally:
        os.close(descriptor)
