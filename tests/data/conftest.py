"""Fixtures: a small corpus, its tokenizer and indexed dataset, and gloo ranks."""

import multiprocessing
import os
import sysconfig
from pathlib import Path

import numpy  # noqa: F401  (imported before anything forks)
import pytest
import torch

from mixtrain.data.preprocess import preprocess
from mixtrain.data.sources import Files
from mixtrain.data.tokenizer import train_bpe

VOCAB_SIZE = 512
NAMES = """abc.py bisect.py copy.py fnmatch.py glob.py heapq.py json/decoder.py json/encoder.py
    keyword.py queue.py sched.py shlex.py textwrap.py this.py token.py types.py""".split()


@pytest.fixture(scope="session")
def library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="session")
def source(library) -> Files:
    """Sixteen small files of text."""
    return Files(library, NAMES)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, source) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe((item.text() for item in source.documents()), VOCAB_SIZE, directory)
    return directory


@pytest.fixture(scope="session")
def indexed(tmp_path_factory, source, tokenizer) -> str:
    """The prefix of an indexed dataset of sixteen documents."""
    prefix = tmp_path_factory.mktemp("indexed") / "small"
    preprocess(source, prefix, tokenizer, log=lambda line: None)
    return str(prefix)


@pytest.fixture
def on_ranks():
    """A function that runs another function on several ranks."""
    return run_on_ranks


def run_on_ranks(world_size: int, function, directory: Path) -> list:
    """Return the results of function(rank) on forked gloo ranks, which open no port."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size
        )
        results.put((rank, function(rank)))
        torch.distributed.barrier()
        os._exit(0)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            raise AssertionError(f"a rank ended with {process.exitcode}")
    values = dict(results.get() for _ in processes)
    return [values[rank] for rank in range(world_size)]
