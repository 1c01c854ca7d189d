"""Names, tracker and manifest: a reader never mistakes a partial checkpoint for a complete one."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest

from mixtrain.checkpoint import directory, integrity, state
from mixtrain.checkpoint.slices import slices_of_range
from mixtrain.checkpoint.state import RunState

SHAPES = [(), (5,), (3, 4), (2, 3, 4), (1, 3, 4), (2, 1, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_of_a_tensor_is_a_few_slices_of_it_in_order(shape):
    count = math.prod(shape)
    for start, stop in itertools.combinations_with_replacement(range(count + 1), 2):
        covered = []
        slices = list(slices_of_range(shape, start, stop, base=100))
        for part in slices:
            bounds = zip(part.offset, part.size, shape, strict=True)
            assert all(
                first >= 0 and size > 0 and first + size <= axis for first, size, axis in bounds
            )
            axes = [
                range(first, first + size)
                for first, size in zip(part.offset, part.size, strict=True)
            ]
            elements = [
                sum(number * math.prod(shape[axis + 1 :]) for axis, number in enumerate(index))
                for index in itertools.product(*axes)
            ]
            assert elements == list(range(part.start - 100, part.stop - 100))
            covered += elements
        assert covered == list(range(start, stop))
        assert len(slices) <= max(1, 2 * len(shape) - 1)
        assert list(slices_of_range(shape, start, stop)) == [
            part._replace(start=part.start - 100, stop=part.stop - 100) for part in slices
        ]


def checkpoint(run_dir: Path, step: int, text: str = "weights") -> Path:
    """Return a small committed directory with a manifest."""
    written = directory.saving_path(directory.path_of(run_dir, step))
    written.mkdir(parents=True)
    (written / "__0_0.distcp").write_text(text)
    integrity.write_manifest(written, integrity.describe([written / "__0_0.distcp"]))
    return directory.commit(written, step)


def test_a_committed_checkpoint_has_megatrons_name_and_the_tracker_names_it(tmp_path):
    path = checkpoint(tmp_path, 100)
    assert path.name == "iter_0000100" and directory.steps_in(tmp_path) == [100]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    assert directory.tracked_step(tmp_path) == 100 and integrity.problem(path, full=True) == ""


def test_steps_are_found_newest_first_and_nothing_else_is_a_checkpoint(tmp_path):
    for step in (20, 3, 12345678):
        checkpoint(tmp_path, step)
    for name in (
        "iter_0000030.saving",
        "iter_0000031.deleting",
        "iter_30",
        "iter_00000xx",
        "other",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000033").write_text(
        "a file, not a directory of that name, is looked at and found wanting"
    )
    assert directory.steps_in(tmp_path) == [12345678, 33, 20, 3]
    assert "integrity.json" in integrity.problem(tmp_path / "iter_0000033", full=False)


@pytest.mark.parametrize("garbage", ["", "release", "12x", "\0\0", "-5", "¹²", "1e3"])
def test_garbage_in_the_tracker_is_no_step(tmp_path, garbage):
    (tmp_path / directory.TRACKER).write_text(garbage)
    assert directory.tracked_step(tmp_path) is None


def test_a_tracker_of_bytes_is_no_step(tmp_path):
    (tmp_path / directory.TRACKER).write_bytes(b"\xff\xfe\x00")
    assert directory.tracked_step(tmp_path) is None


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path):
    checkpoint(tmp_path, 5, "old")
    assert (checkpoint(tmp_path, 5, "new") / "__0_0.distcp").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["iter_0000005", directory.TRACKER]


@pytest.mark.parametrize(
    "keep, left", [(None, [4, 3, 2, 1]), (1, [4]), (2, [4, 3]), (9, [4, 3, 2, 1])]
)
def test_the_oldest_go(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    directory.prune(tmp_path, keep)
    assert directory.steps_in(tmp_path) == left
    assert not list(tmp_path.glob("*.deleting"))


def test_of_a_linked_checkpoint_the_link_goes_and_it_is_said(tmp_path):
    elsewhere = checkpoint(tmp_path / "elsewhere", 1)
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    shutil.rmtree(tmp_path / "iter_0000001")
    (tmp_path / "iter_0000001").symlink_to(elsewhere)
    messages = directory.prune(tmp_path, 1)
    assert messages == [f"iter_0000001 was a link: it is removed, and {elsewhere} is kept"]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "iter_0000003", directory.TRACKER]
    assert integrity.problem(elsewhere, full=True) == ""


def test_a_linked_checkpoint_is_replaced_and_its_leftover_removed_as_any_other(tmp_path):
    elsewhere = checkpoint(tmp_path / "elsewhere", 1, "old")
    (tmp_path / "iter_0000001").symlink_to(elsewhere)
    assert not checkpoint(tmp_path, 1, "new").is_symlink()
    (tmp_path / "iter_0000002.deleting").symlink_to(elsewhere)
    directory.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "iter_0000001", directory.TRACKER]
    assert (elsewhere / "__0_0.distcp").read_text() == "old"


def test_a_file_named_as_a_checkpoint_goes_as_the_others_do(tmp_path):
    (tmp_path / "iter_0000001").write_text("no directory")
    checkpoint(tmp_path, 2)
    assert directory.prune(tmp_path, 1) == []
    assert sorted(os.listdir(tmp_path)) == ["iter_0000002", directory.TRACKER]


def test_a_checkpoint_that_cannot_be_deleted_is_said(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint(tmp_path, step)

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refuse)
    messages = directory.prune(tmp_path, 1)
    assert messages == [
        f"warning: {tmp_path}/iter_0000001 could not be deleted (Operation not permitted)"
    ]


def test_what_a_killed_run_left_half_done_is_removed_and_nothing_else(tmp_path):
    checkpoint(tmp_path, 7)
    for name in (
        "iter_0000008.saving",
        "iter_0000007.replaced",
        "iter_0000001.deleting",
        "mine.saving",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    assert len(directory.remove_leftovers(tmp_path)) == 3
    assert sorted(os.listdir(tmp_path)) == ["iter_0000007", directory.TRACKER, "mine.saving"]


@pytest.mark.parametrize("moment", ["rename", "replace"])
def test_killed_at_any_call_of_a_commit_there_is_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    """Each system call in turn is the last: the newest valid checkpoint is never lost."""
    for number in range(4):
        folder = tmp_path / str(number)
        checkpoint(folder, 5, "old")
        left = [number]
        real = {name: getattr(os, name) for name in ("rename", "replace")}

        class Killed(BaseException):
            pass

        def last(name, *arguments, left=left, real=real, killed=Killed):
            if left[0] == 0:
                raise killed
            left[0] -= 1
            return real[name](*arguments)

        with monkeypatch.context() as patched:
            for name in real:
                patched.setattr(os, name, lambda *a, name=name: last(name, *a))
            try:
                for step in (6, 5):
                    checkpoint(folder, step, "new")
            except Killed:
                pass
        directory.remove_leftovers(folder)
        valid = [
            step
            for step in directory.steps_in(folder)
            if not integrity.problem(directory.path_of(folder, step), True)
        ]
        assert valid and valid[0] >= 5 and valid == directory.steps_in(folder)


def _listed(path: Path, *names: str) -> None:
    there = integrity.describe([path / "__0_0.distcp"])["__0_0.distcp"]
    (path / "x").write_text("weights"), (path.parent / "x").write_text("weights")
    integrity.write_manifest(path, dict.fromkeys(names, there))


DAMAGE = {
    "truncated": lambda path: (path / "__0_0.distcp").write_bytes(b"weigh"),
    "flipped": lambda path: (path / "__0_0.distcp").write_bytes(b"weightz"),
    "missing": lambda path: (path / "__0_0.distcp").unlink(),
    "no manifest": lambda path: (path / "integrity.json").unlink(),
    "empty manifest": lambda path: (path / "integrity.json").write_text(""),
    "half a manifest": lambda path: (path / "integrity.json").write_text(
        '{"format": 1, "files": {"__0_0.dis'
    ),
    "a manifest of nothing": lambda path: (path / "integrity.json").write_text('{"files": {}}'),
    "a manifest without a list": lambda path: (path / "integrity.json").write_text("{}"),
    "a manifest of a list": lambda path: (path / "integrity.json").write_text('{"files": []}'),
    "a manifest that is a number": lambda path: (path / "integrity.json").write_text("5"),
    "a manifest of numbers": lambda path: (path / "integrity.json").write_text(
        '{"files": {"__0_0.distcp": 5}}'
    ),
    "a manifest of words": lambda path: (path / "integrity.json").write_text(
        '{"files": {"__0_0.distcp": {"size": "x", "sha256": ""}}}'
    ),
    "a manifest without hashes": lambda path: (path / "integrity.json").write_text(
        '{"files": {"__0_0.distcp": {"size": 7}}}'
    ),
    "a manifest that is a directory": lambda path: (
        (path / "integrity.json").unlink(),
        (path / "integrity.json").mkdir(),
    ),
    "a manifest that leads outside": lambda path: (path / "integrity.json").write_text(
        '{"files": {"../x": {"size": 1, "sha256": ""}}}'
    ),
    "a manifest that leads outside beside one that does not": lambda path: _listed(
        path, "../x", "__0_0.distcp"
    ),
    "a manifest of a folder inside": lambda path: _listed(path, "__0_0.distcp", "a/x"),
    "a directory for a file": lambda path: (
        (path / "__0_0.distcp").unlink(),
        (path / "__0_0.distcp").mkdir(),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_the_file_named(tmp_path, name):
    path = checkpoint(tmp_path, 1)
    DAMAGE[name](path)
    wrong = integrity.problem(path, full=True)
    assert str(path / ("integrity.json" if "manifest" in name else "__0_0.distcp")) in wrong
    assert ("SHA-256" in wrong) == (name == "flipped")


def test_a_file_that_cannot_be_looked_at_is_named(tmp_path):
    path = checkpoint(tmp_path, 1)
    name = "x" * 300
    integrity.write_manifest(path, {name: integrity.File(1, "0" * 64)})
    assert (
        integrity.problem(path, full=False) == f"{path / name} cannot be read (File name too long)"
    )


def test_sizes_alone_do_not_show_a_flipped_byte(tmp_path):
    path = checkpoint(tmp_path, 1)
    DAMAGE["flipped"](path)
    assert integrity.problem(path, full=False) == ""


def test_what_is_in_a_small_file_is_looked_at_always(tmp_path):
    (tmp_path / state.NAME).write_text("whole")
    integrity.write_manifest(tmp_path, integrity.describe([tmp_path / state.NAME]))
    (tmp_path / state.NAME).write_text("other")
    assert "SHA-256" in integrity.problem(tmp_path, full=False)


def test_a_file_that_is_not_asked_for_is_not_read(tmp_path):
    path = checkpoint(tmp_path, 1)
    DAMAGE["flipped"](path)
    assert integrity.problem(path, full=True, only=lambda name: name != "__0_0.distcp") == ""
    assert "SHA-256" in integrity.problem(path, full=True, only=lambda name: name == "__0_0.distcp")


def test_ranks_share_the_files_and_miss_none(tmp_path):
    path = tmp_path / "iter_0000001"
    path.mkdir()
    for number in range(7):
        (path / f"__{number}_0.distcp").write_text(f"{number}" * (number + 1))
    integrity.write_manifest(path, integrity.describe(sorted(path.iterdir())))
    (path / "__4_0.distcp").write_text("xxxxx")
    found = [integrity.problem(path, True, part, 3) for part in range(3)]
    assert sorted(bool(wrong) for wrong in found) == [False, False, True]


def test_whoever_asks_for_no_share_is_told_of_damage_in_any_file(tmp_path):
    for damaged in range(4):
        path = tmp_path / f"iter_000000{damaged}"
        path.mkdir()
        for number in range(4):
            (path / f"__{number}_0.distcp").write_text(f"{number}" * (number + 1))
        integrity.write_manifest(path, integrity.describe(sorted(path.iterdir())))
        assert integrity.problem(path, full=True) == ""
        name = path / f"__{damaged}_0.distcp"
        name.write_text("x" * (damaged + 1))
        assert (
            integrity.problem(path, full=True)
            == f"{name} is damaged: its SHA-256 is not that of what was written"
        )
    (path / "__0_0.distcp").write_text("x")
    # the largest first, for even shares
    assert str(name) in integrity.problem(path, full=True)


def test_a_watchdog_hears_of_every_block_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "BLOCK", 2)
    path = checkpoint(tmp_path, 1)
    heartbeats = []
    assert integrity.problem(path, full=True, heartbeat=lambda: heartbeats.append(1)) == ""
    assert len(heartbeats) == 4  # 7 bytes in blocks of 2


def test_a_manifest_says_what_format_it_has_and_its_files_by_name(tmp_path):
    file = {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    integrity.write_manifest(tmp_path, {name: integrity.File(**file) for name in ("b", "a")})
    written = json.loads((tmp_path / "integrity.json").read_text())
    assert written == {"format": 1, "files": {"a": file, "b": file}} and list(written["files"]) == [
        "a",
        "b",
    ]


def test_the_state_of_a_run_comes_back_as_it_was(tmp_path):
    there = RunState(
        step=3, consumed_samples=48, data={"order": "ab"}, config={"seed": 1}, validation_due=True
    )
    (tmp_path / state.NAME).write_text(state.to_json(there))
    assert state.read(tmp_path) == there


@pytest.mark.parametrize("text", [None, "", "[1]", '"x"', "{", "\0"])
def test_a_state_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / state.NAME).write_text(text)
    with pytest.raises(ValueError, match=state.NAME):
        state.read(tmp_path)


def test_a_directory_that_is_gone_has_no_checkpoints(tmp_path):
    shutil.rmtree(tmp_path)
    assert directory.steps_in(tmp_path) == [] and directory.tracked_step(tmp_path) is None
    assert directory.remove_leftovers(tmp_path) == []
