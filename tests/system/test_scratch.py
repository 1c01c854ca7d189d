"""A folder under the temporary directory goes with its process, however that ends."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path

import pytest

from mixtrain.errors import UserError
from mixtrain.system import scratch


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed_with(folder) -> str:
    """The folder of a forked process that was killed while it had it."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with folder as path:
            os.write(writes, path.encode())
            signal.pause()
    path = os.read(reads, 1000).decode()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reads), os.close(writes)
    return path


def test_a_folder_is_this_users_alone_and_goes_with_the_block(temporary):
    with scratch.folder("some-") as path:
        assert Path(path).parent == temporary and os.path.basename(path).startswith(
            "mixtrain-some-"
        )
        assert os.stat(path).st_mode & 0o777 == 0o700
    assert os.listdir(temporary) == []


def test_what_a_killed_process_left_goes_when_the_next_one_starts(temporary):
    left = killed_with(scratch.folder("parity-"))
    assert os.path.isdir(left)
    with scratch.folder() as path:
        assert os.listdir(temporary) == [os.path.basename(path)]


def test_a_folder_in_use_stays_and_so_does_what_is_not_known_to_be_left(temporary):
    (temporary / "mixtrain-notes").mkdir()
    (temporary / "mixtrain-file").write_text("")
    (temporary / "mixtrain-link").symlink_to("/usr")
    elsewhere = killed_with(scratch.folder("elsewhere-"))
    # its locks may not be seen here
    Path(elsewhere, scratch.OWNER).write_text(socket.gethostname() + "-2")
    kept = killed_with(scratch.folder("kept-"))
    scratch.keep(kept)
    with scratch.folder() as used:
        assert scratch.remove_left_behind() == []
        assert all(
            os.path.isdir(path) for path in (used, elsewhere, kept, temporary / "mixtrain-link")
        )
        assert len(os.listdir(temporary)) == 6


def test_a_temporary_directory_that_cannot_be_written_is_refused_in_a_line(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    with (
        pytest.raises(UserError, match="gone.*: No such file or directory; set TMPDIR"),
        scratch.folder(),
    ):
        pass
