"""A lock is its user's alone, and whoever is said to hold it does."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import pytest
from composing import plan_of

from mixtrain.errors import UserError
from mixtrain.interop.convert.output_directory import written_whole
from mixtrain.system import locks
from mixtrain.training.run_directory import LOCK, claim, is_in_use

NOBODY = 65534
HERE = socket.gethostname()
OLD = f"process 1 on {HERE} since 2020-01-01 00:00:00\n"


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def refused(run_dir: Path) -> str:
    with pytest.raises(UserError) as caught, claim(plan_of(f"run_dir={run_dir}")):
        pass
    return str(caught.value)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a run directory, and has not signed it."""
    (tmp_path / LOCK).write_text(OLD)
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        held = os.open(tmp_path / LOCK, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        os.write(writes, b"x")
        os.read(os.pipe()[0], 1)  # for ever
    os.read(reads, 1)
    yield child
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_run_directorys_lock_is_its_users_alone_also_one_that_a_former_run_left(tmp_path):
    for name, there in (("new", False), ("old", True)):
        if there:
            (tmp_path / name).mkdir()
            (tmp_path / name / LOCK).write_text(OLD)
            (tmp_path / name / LOCK).chmod(0o666)
        with claim(plan_of(f"run_dir={tmp_path}/{name}")):
            assert mode(tmp_path / name / LOCK) == 0o600
            assert f"process {os.getpid()} on" in (tmp_path / name / LOCK).read_text()


def test_who_holds_a_lock_is_named_and_not_who_signed_it_last(tmp_path, holder):
    message = refused(tmp_path)
    assert (
        f"in use by process {holder} on {HERE} (the last one that signed it: {OLD.strip()}); wait"
        " for it" in message
    )


def test_a_holder_that_cannot_be_seen_is_not_guessed(tmp_path, holder, monkeypatch):
    # on another host, or another user's
    monkeypatch.setattr(locks, "_local_holders", lambda descriptor: [])
    message = refused(tmp_path)
    assert (
        f"in use by a process that cannot be seen from {HERE} (the last one that signed it:"
        " process 1 on" in message
    )
    # is not repeated on a terminal
    (tmp_path / LOCK).write_text("process 1 on \x1b[31mred since never\n")
    assert "\x1b" not in (message := refused(tmp_path)) and "(nobody has signed it)" in message


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_file_of_its_own_is_no_lock_and_what_it_leads_to_is_left_alone(tmp_path, kind):
    run_dir = tmp_path / "run"
    other = tmp_path / "other"
    run_dir.mkdir()
    other.write_text("kept")
    {
        "link": lambda path: path.symlink_to(other),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
    }[kind](run_dir / LOCK)
    assert re.search(
        rf"run_dir = {run_dir} cannot be made or written \(\.lock: .+\); give another",
        refused(run_dir),
    )
    assert other.read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_users_lock_can_neither_be_held_nor_is_its_run_said_to_have_ended():
    folder = Path(tempfile.mkdtemp())
    try:
        os.chmod(folder, 0o777)
        with claim(plan_of(f"run_dir={folder}")):
            pass
        plan = plan_of(f"run_dir={folder}")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setuid(NOBODY)
                with pytest.raises(PermissionError):
                    os.open(folder / LOCK, os.O_RDONLY)
                with pytest.raises(
                    UserError, match=r"\.lock: it belongs to user root, who alone can tell whether"
                ):
                    with claim(plan):
                        pass
                assert is_in_use(str(folder))
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert not is_in_use(str(folder))
    finally:
        shutil.rmtree(folder)


def test_a_directory_that_is_converted_to_is_its_users_alone_until_it_is_whole(tmp_path):
    before = os.umask(0o022)
    try:
        (tmp_path / "out.writing").mkdir(0o755)  # of a conversion that was killed
        with written_whole(tmp_path / "out", 0, 1) as writing:
            assert mode(writing) == 0o700
            with pytest.raises(UserError, match="is being written by another conversion"):
                with written_whole(tmp_path / "out", 0, 1):
                    pass
        assert mode(tmp_path / "out") == 0o755
    finally:
        os.umask(before)
