"""The directory a conversion writes: nothing has its name before all of it is on the disk; and who copies, and how far.

Rule: what a killed conversion leaves is called OUT_DIR.writing, which no reader takes for a model and the next
conversion of the same name removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mixtrain.checkpoint.directory import sync
from mixtrain.console import Console
from mixtrain.environment import die_with
from mixtrain.errors import Fault, UserError

MARGIN = 1 << 22  # bytes that small files and headers may take
QUIET = 5  # seconds before a log is told how far it is


@contextlib.contextmanager
def written_whole(out: Path, size: int) -> Iterator[Path]:
    """An empty directory to write `size` bytes to, which becomes `out` if the block ends well, and else is removed.

    UserError if there is something at `out`, if it is being written, or if its disk has no room.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not os.listdir(out)):
        raise UserError(f"{out} is there already: give a new directory, or remove it")
    there = next(path for path in out.parents if path.is_dir())
    if (free := shutil.disk_usage(there).free) < size + MARGIN:
        raise UserError(f"{out} would take {size + MARGIN:,} bytes, but {free:,} are free on its disk")
    writing = out.with_name(out.name + ".writing")
    try:
        writing.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{writing} cannot be made ({error.strerror})") from None
    with _claimed(writing):
        for path in writing.iterdir():  # of a conversion that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield writing
            sync(writing)
            writing.chmod(0o777 & ~_umask())
            os.rename(writing, out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise


@contextlib.contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Hold a directory alone, as long as this process lives. It is the user's alone: who can open it can hold it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(PermissionError):  # a file system without modes
            os.fchmod(descriptor, 0o700)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
            return
        raise UserError(f"{directory} is being written by another conversion")
    finally:
        os.close(descriptor)


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


Advance = Callable[[int], None]  # by so many bytes
T = TypeVar("T")


def dealt(parts: Sequence[T], shares: int, size: Callable[[T], int]) -> list[list[T]]:
    """The parts in their order, in as many shares of about as many bytes."""
    whole, done, found = sum(map(size, parts)), 0, [[] for _ in range(shares)]
    for part in parts:
        found[min(shares * done // max(whole, 1), shares - 1)].append(part)
        done += size(part)
    return found


def in_processes(what: str, jobs: Sequence[Callable[[Advance], Any]], size: int) -> list[Any]:
    """The results of the jobs, each run in a process of its own (one alone: in this one), with a bar of `size` bytes.

    A UserError or Fault of one is raised here, and the others are ended.
    """
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)

    def advance(count: int) -> None:
        with done.get_lock():
            done.value += count

    with bar(what, size, lambda: done.value):
        return [jobs[0](advance)] if len(jobs) == 1 else _forked(context, jobs, advance)


def _forked(context, jobs: Sequence[Callable[[Advance], Any]], advance: Advance) -> list[Any]:
    parent, workers = os.getpid(), []
    try:
        for job in jobs:
            mine, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_live, args=(parent, job, advance, theirs), daemon=True)
            worker.start()
            theirs.close()  # so that a dead worker is the end of its pipe
            workers.append((worker, mine))
        return [_result(worker, pipe) for worker, pipe in workers]
    finally:
        for worker, _ in workers:
            worker.kill()
            worker.join()


def _live(parent: int, job: Callable[[Advance], Any], advance: Advance, pipe) -> None:
    die_with(parent)
    try:
        pipe.send((None, job(advance)))
    except (UserError, Fault) as error:
        pipe.send((error, None))


def _result(worker, pipe) -> Any:
    try:
        error, result = pipe.recv()
    except EOFError:
        worker.join()
        raise Fault(f"a process of the conversion ended with exit code {worker.exitcode}; its log is above") from None
    if error:
        raise error
    return result


@contextlib.contextmanager
def bar(what: str, size: int, done: Callable[[], int]) -> Iterator[None]:
    """Show how far a copy is: a bar on a terminal, elsewhere a line for each tenth."""
    ending, started = threading.Event(), time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)

    def watch(progress: Progress) -> None:
        task, tenth = progress.add_task(what, total=size), 0
        while not ending.wait(0.2):
            progress.update(task, completed=done())
            spent, reached = time.monotonic() - started, 10 * done() // max(size, 1)
            if not console.is_terminal and reached > tenth and spent > QUIET:
                tenth, left = reached, spent * (size / done() - 1)
                print(f"{what}: {decimal(done())} of {decimal(size)}, {left:.0f} s left", file=sys.stderr, flush=True)
        progress.update(task, completed=done())

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        watcher = threading.Thread(target=watch, args=(progress,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ending.set()
            watcher.join()
