"""The small files of a checkpoint: how much of them is read, and the messages for damage."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evil_pickles import small_index

from mixtrain.checkpoint import pickles, safe
from mixtrain.errors import UserError

INDEX = pickle.dumps(small_index(None))


def refused(read: Callable[[Path], object], directory: Path) -> str:
    with pytest.raises(UserError) as refusal:
        read(directory)
    (message,) = refusal.value.problems
    return message.removeprefix(f"{directory}/")


def test_an_index_is_read_up_to_the_most_bytes(tmp_path, monkeypatch):
    (tmp_path / ".metadata").write_bytes(INDEX)
    monkeypatch.setattr(pickles, "MOST", len(INDEX))
    assert "decoder.weight" in safe.read_metadata(tmp_path).state_dict_metadata
    monkeypatch.setattr(pickles, "MOST", len(INDEX) - 1)
    message = (
        f".metadata is damaged: it has {len(INDEX):,} bytes; at most {len(INDEX) - 1:,} are read"
    )
    assert refused(safe.read_metadata, tmp_path) == message


def test_no_more_than_256_mib_of_an_index_are_read(tmp_path):
    (tmp_path / ".metadata").touch()
    os.truncate(tmp_path / ".metadata", (1 << 28) + 1)
    message = ".metadata is damaged: it has 268,435,457 bytes; at most 268,435,456 are read"
    assert refused(safe.read_metadata, tmp_path) == message


def test_the_common_state_is_a_mapping(tmp_path):
    torch.save({"iteration": 2}, tmp_path / "common.pt")
    assert safe.read_common(tmp_path) == {"iteration": 2}
    torch.save([2], tmp_path / "common.pt")
    message = "common.pt is damaged: it is not the common state of a checkpoint"
    assert refused(safe.read_common, tmp_path) == message


@pytest.mark.parametrize(
    "read, file", [(safe.read_metadata, ".metadata"), (safe.read_common, "common.pt")]
)
def test_a_file_that_cannot_be_read_is_named(read, file, tmp_path):
    assert refused(read, tmp_path) == f"{file} cannot be read (No such file or directory)"
    (tmp_path / file).mkdir()
    assert refused(read, tmp_path) == f"{file} cannot be read (Is a directory)"
    (tmp_path / file).rmdir()
    os.mkfifo(tmp_path / file)
    assert refused(read, tmp_path) == f"{file} is not a file"


def test_what_is_wrong_with_a_file_stands_after_its_name(tmp_path):
    for data, message in [
        (b"", " is damaged at byte 0"),
        (pickle.dumps(5), " is damaged: it is not an index"),
        (pickle.dumps(print), ": a pickle that wants builtins.print is not loaded"),
    ]:
        (tmp_path / ".metadata").write_bytes(data)
        assert refused(safe.read_metadata, tmp_path) == f".metadata{message}"
