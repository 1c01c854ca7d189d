"""Run the jobs of a conversion in processes, and show its progress."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, TypeVar

import torch
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mixtrain.errors import Fault, UserError
from mixtrain.system.console import Console
from mixtrain.system.rank_identity import die_with

QUIET = 5  # seconds before progress lines are printed where there is no terminal

Advance = Callable[[int], None]  # report so many more bytes as done
Job = Callable[[Advance], Any]
T = TypeVar("T")


def split_evenly(items: Sequence[T], count: int, size: Callable[[T], int]) -> list[list[T]]:
    """Split items, in order, into `count` lists of about the same total size."""
    total = sum(map(size, items))
    done = 0
    shares: list[list[T]] = [[] for _ in range(count)]
    for item in items:
        shares[min(count * done // max(total, 1), count - 1)].append(item)
        done += size(item)
    return shares


def run_jobs(
    label: str, jobs: Sequence[Job], size: int, background: Sequence[Job] = ()
) -> list[Any]:
    """Run each job in its own process, with a progress bar of `size` bytes; return their results.

    A single job runs in this process. `background` jobs run in their own processes beside them;
    they have no result, and must succeed too. The first UserError, Fault or OSError of any job is
    raised at once and the other processes are killed.
    """
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    single = len(jobs) == 1

    def advance(count: int) -> None:
        with done.get_lock():
            done.value += count

    with (
        progress_bar(label, size, lambda: min(done.value, size)),
        WorkerPool(context, advance) as pool,
    ):
        for job in (*jobs[single:], *background):
            pool.start(job)

        def advance_here(count: int) -> None:
            advance(count)
            pool.collect(0)  # a failed background job ends this one

        results = [jobs[0](advance_here)] if single else []
        return [*results, *pool.results()][: len(jobs)]


class WorkerPool:
    """One process for each job; leaving the context kills those that are left."""

    def __init__(self, context, advance: Advance):
        self.context = context
        self.advance = advance
        self.parent = os.getpid()
        self.processes: list[Any] = []
        self.pending: dict[Any, int] = {}  # pipe -> number of the job
        self.finished: dict[int, Any] = {}  # number of the job -> result

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def start(self, job: Job) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_run_job, args=(self.parent, job, self.advance, sender), daemon=True
        )
        process.start()
        sender.close()  # so that the pipe ends when the process dies
        self.pending[receiver] = len(self.processes)
        self.processes.append(process)

    def collect(self, seconds: float | None = None) -> None:
        """Collect results that arrive within so many seconds; raise an error among them."""
        for pipe in connection.wait(list(self.pending), seconds):
            number = self.pending.pop(pipe)
            self.finished[number] = _receive(self.processes[number], pipe)

    def results(self) -> list[Any]:
        """Wait for all jobs; return their results in the order of `start`."""
        while self.pending:
            self.collect()
        return [self.finished[number] for number in range(len(self.processes))]


def _run_job(parent: int, job: Job, advance: Advance, pipe) -> None:
    die_with(parent)
    torch.set_num_threads(1)  # a forked process lacks the threads of its parent's thread pool
    try:
        pipe.send((None, job(advance)))
    except (UserError, Fault, OSError) as error:
        pipe.send((error, None))


def _receive(process, pipe) -> Any:
    try:
        error, result = pipe.recv()
    except EOFError:
        process.join()
        raise Fault(
            f"a process of the conversion ended with exit code {process.exitcode}; its log is above"
        ) from None
    if error:
        raise error
    return result


@contextlib.contextmanager
def progress_bar(label: str, size: int, done: Callable[[], int]) -> Iterator[None]:
    """Show the progress in bytes: a bar on a terminal, otherwise a line for each tenth."""
    ending = threading.Event()
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)

    def watch(progress: Progress) -> None:
        task = progress.add_task(label, total=size)
        shown_tenth = 0
        while not ending.wait(0.2):
            progress.update(task, completed=done())
            spent = time.monotonic() - started
            tenth = 10 * done() // max(size, 1)
            if not console.is_terminal and tenth > shown_tenth and spent > QUIET:
                shown_tenth = tenth
                left = spent * (size / done() - 1)
                print(
                    f"{label}: {decimal(done())} of {decimal(size)}, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
        progress.update(task, completed=done())

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        watcher = threading.Thread(target=watch, args=(progress,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ending.set()
            watcher.join()
