"""A rank's share of a checkpoint, on its way to the disk: one or two files, each hashed while it is written.

Rule: nothing here communicates, so that it can run in a process of its own while training goes on (`Writer`), and every
wait has an end.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from mixtrain.checkpoint.integrity import File
from mixtrain.errors import UserError
from mixtrain.system.rank_identity import die_with

FILES = 2  # a rank's, written side by side
Item = tuple[WriteItem, torch.Tensor | io.BytesIO]


class Written(NamedTuple):
    """What became of a rank's share."""

    error: str = ""  # "" if all is on the disk
    number: int = 0  # of the error, if it is one of the system
    results: tuple[WriteResult, ...] = ()  # where each item lies, for .metadata
    files: tuple[tuple[str, File], ...] = ()  # for the manifest


def write(
    directory: Path, rank: int, items: list[Item], heartbeat: Callable[[], None] = lambda: None
) -> Written:
    """Write a rank's items, in Megatron-Core's files __RANK_N.distcp. What goes wrong is in the result, not raised."""
    return write_files(directory, rank, [share for share in _shares(items) if share], heartbeat)


def write_files(
    directory: Path,
    rank: int,
    shares: Sequence[Iterable[Item]],
    heartbeat: Callable[[], None] = lambda: None,
) -> Written:
    """The same with a file for each of the shares, whose items may come one by one. A UserError of theirs is raised."""
    checksums = get_crc32_options()
    set_crc32_options(False)  # the manifest has better ones, and torch.load never looks at these
    try:
        # the first rank has, but another node's file system may not know it yet
        directory.mkdir(exist_ok=True)
        with ThreadPoolExecutor(max(1, len(shares))) as threads:
            names = [f"__{rank}_{number}.distcp" for number in range(len(shares))]
            jobs = [
                threads.submit(_write_file, directory / name, share, heartbeat)
                for name, share in zip(names, shares, strict=True)
            ]
            done = [job.result() for job in jobs]
    except OSError as error:
        return Written(f"{error.filename or directory}: {error.strerror}", error.errno or 0)
    except UserError:
        raise
    except Exception as error:
        return Written(f"{directory}: {type(error).__name__}: {error}")
    finally:
        set_crc32_options(checksums)
    results = tuple(result for found, _ in done for result in found)
    return Written(
        results=results, files=tuple(zip(names, (file for _, file in done), strict=True))
    )


def size_of(items: list[Item]) -> int:
    """Bytes of the data of the items, which is a little less than they take."""
    return sum(data.numel() * data.element_size() if isinstance(data, torch.Tensor) else data.getbuffer().nbytes
               for _, data in items)  # fmt: skip


def _shares(items: list[Item]) -> list[list[Item]]:
    """The items dealt out to FILES files, the largest first, to the file that has least."""
    shares: list[list[Item]] = [[] for _ in range(FILES)]
    sizes = [0] * FILES
    for item in sorted(items, key=lambda item: -size_of([item])):
        least = sizes.index(min(sizes))
        shares[least].append(item)
        sizes[least] += size_of([item])
    return shares


def _write_file(
    path: Path, items: Iterable[Item], heartbeat: Callable[[], None]
) -> tuple[list[WriteResult], File]:
    with ThreadPoolExecutor(1) as hasher, open(path, "wb", buffering=0) as file:
        stream = _HashedStream(file, hasher)
        try:
            results = [
                _write_item(path.name, item, data, stream, heartbeat) for item, data in items
            ]
        except RuntimeError:  # torch.save's own words for a stream that fails
            raise stream.error or sys.exception() from None
        os.fsync(file.fileno())
    return results, File(stream.position, stream.digest.hexdigest())


def _write_item(
    name: str,
    item: WriteItem,
    data: torch.Tensor | io.BytesIO,
    stream: _HashedStream,
    heartbeat: Callable[[], None],
) -> WriteResult:
    """One tensor or object, as PyTorch's own writer of checkpoints writes it."""
    offset = stream.position
    if isinstance(data, torch.Tensor):
        torch.save(_alone(data), stream)
    else:
        stream.write(data.getbuffer())
    heartbeat()
    length = stream.position - offset
    return WriteResult(item.index, length, _StorageInfo(name, offset, length))


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of its own, without copying it: torch.save writes all of a view's storage."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    if not flat.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.frombuffer(flat.view(torch.uint8).numpy(), dtype=tensor.dtype).view(tensor.shape)


class _HashedStream(io.RawIOBase):
    """Writes to a file and hashes what it writes, both at once: neither holds Python's lock."""

    def __init__(self, file: io.FileIO, hasher: ThreadPoolExecutor):
        self.file = file
        self.hasher = hasher
        self.digest = hashlib.sha256()
        self.position = 0
        self.error = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        hashed = (
            self.hasher.submit(self.digest.update, view)
            if len(view) > 1 << 16
            else self.digest.update(view)
        )
        try:
            done = 0
            while done < len(view):  # an unbuffered file may take a part
                done += self.file.write(view[done:])
        except OSError as error:
            error.filename = self.file.name
            self.error = error
            raise
        finally:
            if hashed:
                hashed.result()  # `data` is the caller's again when this returns
        self.position += len(view)
        return len(view)


class Writer:
    """The same in a forked process, which has the tensors as they were when it was forked."""

    def __init__(self, directory: Path, rank: int, items: list[Item], timeout: float):
        self.rank = rank
        self.deadline = time.monotonic() + timeout
        self.timeout = timeout
        # of this process alone: what is unpickled from it nobody else can have written; in memory,
        # as disks may be full
        self.answer = (
            open(os.memfd_create("answer"), "w+b")
            if hasattr(os, "memfd_create")
            else TemporaryFile()
        )
        parent = os.getpid()
        self.process = os.fork()
        if self.process == 0:
            self._live(parent, directory, items)

    def _live(self, parent: int, directory: Path, items: list[Item]) -> None:
        """The life of the child; it never returns."""
        code = 1
        try:
            die_with(parent)
            pickle.dump(write(directory, self.rank, items), self.answer)
            self.answer.flush()
            code = 0
        finally:
            os._exit(code)

    def poll(self) -> Written | None:
        """What became of it, or None while it is at it. It is ended when its time is up."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        if done:
            return self._read(os.waitstatus_to_exitcode(status))
        if time.monotonic() < self.deadline:
            return None
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        return Written(
            f"the writer of rank {self.rank} had not finished after {self.timeout:.0f} s and was"
            " ended"
        )

    def _read(self, code: int) -> Written:
        if code < 0:
            return Written(
                f"the writer of rank {self.rank} was ended by {signal.Signals(-code).name}"
            )
        if code:
            return Written(f"the writer of rank {self.rank} failed; its log has more")
        self.answer.seek(0)
        with self.answer:
            return pickle.load(self.answer)

    def wait(self, heartbeat: Callable[[], None] = lambda: None) -> Written:
        while (written := self.poll()) is None:
            heartbeat()
            time.sleep(0.01)
        return written
