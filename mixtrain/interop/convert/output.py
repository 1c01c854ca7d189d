"""The directory a conversion writes: nothing has its name before all of it is on the disk; and who copies, and how far.

Rule: what a killed conversion leaves is called OUT_DIR.writing, which no reader takes for a model and the next
conversion of the same name removes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
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

from mixtrain.checkpoint.directory import sync
from mixtrain.errors import Fault, UserError
from mixtrain.system import partial
from mixtrain.system.console import Console
from mixtrain.system.rank_identity import die_with

MARGIN = 1 << 22  # bytes that small files may take
# bytes that a tensor or a chunk may take beside its data: in a header, an index, a manifest
HEADER = 1 << 11
QUIET = 5  # seconds before a log is told how far it is


@contextlib.contextmanager
def written_whole(out: Path, size: int, parts: int) -> Iterator[Path]:
    """An empty directory for `size` bytes in `parts` chunks: it becomes `out` if the block ends well, else is removed.

    UserError if there is something at `out`, if it is being written, or if its disk has no room. An OSError within the
    block is a Fault: what could not be written or read, and of a full disk how much was wanted and is there.
    """
    out = Path(os.path.abspath(out))
    margin = MARGIN + HEADER * parts
    if out.exists() and not (out.is_dir() and not os.listdir(out)):
        raise UserError(f"{out} is there already: give a new directory, or remove it")
    writing = out.with_name(out.name + ".writing")
    made = partial.make(writing)
    with partial.claim(writing, "conversion"):
        try:
            for path in writing.iterdir():  # of a conversion that was killed
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if (free := partial.free(writing)) < size + margin:
                raise UserError(
                    f"{out} takes {_takes(size, margin)}, but {free:,} are free on its disk"
                )
            yield writing
            sync(writing)
            writing.chmod(0o777 & ~_umask())
            os.rename(writing, out)
            sync(out.parent)
        except OSError as error:
            # measured before it is removed
            words = partial.failure_message(out, writing, error, _takes(size, margin))
            partial.remove(made or [writing])
            raise Fault(words) from None
        except BaseException:
            partial.remove(made or [writing])
            raise


def _takes(size: int, margin: int) -> str:
    return f"{size:,} bytes, and up to {margin:,} for headers and small files"


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


Advance = Callable[[int], None]  # by so many bytes
Job = Callable[[Advance], Any]
T = TypeVar("T")


def dealt(parts: Sequence[T], shares: int, size: Callable[[T], int]) -> list[list[T]]:
    """The parts in their order, in as many shares of about as many bytes."""
    whole = sum(map(size, parts))
    done = 0
    found = [[] for _ in range(shares)]
    for part in parts:
        found[min(shares * done // max(whole, 1), shares - 1)].append(part)
        done += size(part)
    return found


def in_processes(
    what: str, jobs: Sequence[Job], size: int, beside: Sequence[Job] = ()
) -> list[Any]:
    """The results of the jobs, each run in a process of its own (one alone: in this one), with a bar of `size` bytes.

    Those `beside` them have processes of their own and no result; they too must end well. A UserError, Fault or OSError
    of one is raised here as soon as it is known, and the others are ended.
    """
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    alone = len(jobs) == 1

    def advance(count: int) -> None:
        with done.get_lock():
            done.value += count

    with bar(what, size, lambda: min(done.value, size)), Workers(context, advance) as workers:
        for job in (*jobs[alone:], *beside):
            workers.start(job)
        here = [jobs[0](lambda count: [advance(count), workers.take(0)])] if alone else []
        return [*here, *workers.all()][: len(jobs)]


class Workers:
    """Processes of jobs. Within the block they live."""

    def __init__(self, context, advance: Advance):
        self.context = context
        self.advance = advance
        self.parent = os.getpid()
        self.processes: list[Any] = []
        self.waiting: dict[Any, int] = {}  # pipe: the job's number
        self.results: dict[int, Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.processes:
            worker.kill()
            worker.join()

    def start(self, job: Job) -> None:
        mine, theirs = self.context.Pipe(duplex=False)
        worker = self.context.Process(
            target=_live, args=(self.parent, job, self.advance, theirs), daemon=True
        )
        worker.start()
        theirs.close()  # so that a dead worker is the end of its pipe
        self.waiting[mine] = len(self.processes)
        self.processes.append(worker)

    def take(self, seconds: float | None = None) -> None:
        """Take the results that are there, or come within so many seconds. An error among them is raised."""
        for pipe in connection.wait(list(self.waiting), seconds):
            number = self.waiting.pop(pipe)
            self.results[number] = _result(self.processes[number], pipe)

    def all(self) -> list[Any]:
        """Every result, in the order of the jobs."""
        while self.waiting:
            self.take()
        return [self.results[number] for number in range(len(self.processes))]


def _live(parent: int, job: Job, advance: Advance, pipe) -> None:
    die_with(parent)
    # a forked process has none of the threads that its parent made for such work
    torch.set_num_threads(1)
    try:
        pipe.send((None, job(advance)))
    except (UserError, Fault, OSError) as error:
        pipe.send((error, None))


def _result(worker, pipe) -> Any:
    try:
        error, result = pipe.recv()
    except EOFError:
        worker.join()
        raise Fault(
            f"a process of the conversion ended with exit code {worker.exitcode}; its log is above"
        ) from None
    if error:
        raise error
    return result


@contextlib.contextmanager
def bar(what: str, size: int, done: Callable[[], int]) -> Iterator[None]:
    """Show how far a copy is: a bar on a terminal, elsewhere a line for each tenth."""
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
        task = progress.add_task(what, total=size)
        tenth = 0
        while not ending.wait(0.2):
            progress.update(task, completed=done())
            spent = time.monotonic() - started
            reached = 10 * done() // max(size, 1)
            if not console.is_terminal and reached > tenth and spent > QUIET:
                tenth = reached
                left = spent * (size / done() - 1)
                print(
                    f"{what}: {decimal(done())} of {decimal(size)}, {left:.0f} s left",
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
