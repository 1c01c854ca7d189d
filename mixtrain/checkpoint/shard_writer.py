"""Write one rank's share of a checkpoint: one or two files, hashed while they are written.

Rule: nothing here communicates, so it can run in a separate process while training continues
(`BackgroundWriter`), and every wait is bounded.
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

FILES_PER_RANK = 2  # written concurrently
LARGE_WRITE = 1 << 16  # bytes: above this, hashing runs in another thread
Item = tuple[WriteItem, torch.Tensor | io.BytesIO]


class WriteOutcome(NamedTuple):
    """The result of writing one rank's share."""

    error: str = ""  # "" if everything is on disk
    errno: int = 0  # 0 if the error is not from the operating system
    results: tuple[WriteResult, ...] = ()  # where each item is stored, for .metadata
    files: tuple[tuple[str, File], ...] = ()  # for the manifest


def write_shards(
    directory: Path, rank: int, items: list[Item], heartbeat: Callable[[], None] = lambda: None
) -> WriteOutcome:
    """Write a rank's items to Megatron-Core's files __RANK_N.distcp; errors are in the outcome."""
    return write_files(directory, rank, [share for share in _split(items) if share], heartbeat)


def write_files(
    directory: Path,
    rank: int,
    shares: Sequence[Iterable[Item]],
    heartbeat: Callable[[], None] = lambda: None,
) -> WriteOutcome:
    """Write one file for each share, whose items may be generated; errors are in the outcome.

    Only a UserError that a generator raises is raised again.
    """
    crc32 = get_crc32_options()
    # the manifest has SHA-256, and torch.load never checks the CRC-32
    set_crc32_options(False)
    try:
        # the first rank has made it, but another node's file system may not see it yet
        directory.mkdir(exist_ok=True)
        with ThreadPoolExecutor(max(1, len(shares))) as threads:
            names = [f"__{rank}_{number}.distcp" for number in range(len(shares))]
            jobs = [
                threads.submit(_write_file, directory / name, share, heartbeat)
                for name, share in zip(names, shares, strict=True)
            ]
            written = [job.result() for job in jobs]
    except OSError as error:
        return WriteOutcome(f"{error.filename or directory}: {error.strerror}", error.errno or 0)
    except UserError:
        raise
    except Exception as error:
        return WriteOutcome(f"{directory}: {type(error).__name__}: {error}")
    finally:
        set_crc32_options(crc32)
    results = tuple(result for results_of_file, _ in written for result in results_of_file)
    files = tuple(zip(names, (file for _, file in written), strict=True))
    return WriteOutcome(results=results, files=files)


def total_bytes(items: list[Item]) -> int:
    """Return the bytes of the items' data; the files are slightly larger."""
    return sum(
        data.nbytes if isinstance(data, torch.Tensor) else data.getbuffer().nbytes
        for _, data in items
    )


def _split(items: list[Item]) -> list[list[Item]]:
    """Split the items over FILES_PER_RANK files: the largest first, each to the smallest file."""
    shares: list[list[Item]] = [[] for _ in range(FILES_PER_RANK)]
    sizes = [0] * FILES_PER_RANK
    for item in sorted(items, key=lambda item: -total_bytes([item])):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(item)
        sizes[smallest] += total_bytes([item])
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
        except RuntimeError:  # torch.save replaces the stream's error
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
    """Write one tensor or object in the format of PyTorch's FileSystemWriter."""
    offset = stream.position
    if isinstance(data, torch.Tensor):
        torch.save(_with_own_storage(data), stream)
    else:
        stream.write(data.getbuffer())
    heartbeat()
    length = stream.position - offset
    return WriteResult(item.index, length, _StorageInfo(name, offset, length))


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its own storage, not copied: torch.save writes all of a view's."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    if not flat.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.frombuffer(flat.view(torch.uint8).numpy(), dtype=tensor.dtype).view(tensor.shape)


class _HashedStream(io.RawIOBase):
    """Writes to a file and hashes the same data concurrently: both release Python's lock."""

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
        hashing = None
        if len(view) > LARGE_WRITE:
            hashing = self.hasher.submit(self.digest.update, view)
        else:
            self.digest.update(view)
        try:
            done = 0
            while done < len(view):  # an unbuffered file may write only a part
                done += self.file.write(view[done:])
        except OSError as error:
            error.filename = self.file.name
            self.error = error
            raise
        finally:
            if hashing:
                hashing.result()  # the caller may change `data` after this returns
        self.position += len(view)
        return len(view)


class BackgroundWriter:
    """Writes a rank's items in a forked process, which has the tensors as they were at the fork."""

    def __init__(self, directory: Path, rank: int, items: list[Item], timeout: float):
        self.rank = rank
        self.deadline = time.monotonic() + timeout
        self.timeout = timeout  # seconds
        # The outcome, pickled. Only this process and its child can open it; in memory if possible,
        # since disks may be full.
        if hasattr(os, "memfd_create"):
            self.answer = open(os.memfd_create("answer"), "w+b")
        else:
            self.answer = TemporaryFile()
        parent = os.getpid()
        self.process = os.fork()
        if self.process == 0:
            self._run_child(parent, directory, items)

    def _run_child(self, parent: int, directory: Path, items: list[Item]) -> None:
        """Write the items and the outcome, then exit; never returns."""
        code = 1
        try:
            die_with(parent)
            pickle.dump(write_shards(directory, self.rank, items), self.answer)
            self.answer.flush()
            code = 0
        finally:
            os._exit(code)

    def poll(self) -> WriteOutcome | None:
        """Return the outcome, or None while the process writes; kill it after the timeout."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        if done:
            return self._outcome(os.waitstatus_to_exitcode(status))
        if time.monotonic() < self.deadline:
            return None
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        return WriteOutcome(
            f"the writer of rank {self.rank} had not finished after {self.timeout:.0f} s and was"
            " ended"
        )

    def _outcome(self, code: int) -> WriteOutcome:
        if code < 0:
            name = signal.Signals(-code).name
            return WriteOutcome(f"the writer of rank {self.rank} was ended by {name}")
        if code:
            return WriteOutcome(f"the writer of rank {self.rank} failed; its log has more")
        self.answer.seek(0)
        with self.answer:
            return pickle.load(self.answer)

    def wait(self, heartbeat: Callable[[], None] = lambda: None) -> WriteOutcome:
        while (outcome := self.poll()) is None:
            heartbeat()
            time.sleep(0.01)
        return outcome
