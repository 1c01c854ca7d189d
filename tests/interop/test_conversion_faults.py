"""What a conversion meets on its way: damaged files, what is no number, a full disk. Nothing is
left of it then.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import torch
from composing import ROOT
from safetensors.torch import load_file, save_file

from mixtrain.checkpoint import integrity
from mixtrain.errors import FAULT, FINISHED, Fault, UserError
from mixtrain.interop.convert import checkpoint_config, output_directory, to_hf, to_megatron
from mixtrain.interop.convert.dtype_cast import DtypeCast
from mixtrain.system import mmap_tensor, partial

sys.path.insert(0, str(ROOT / "tools"))
import checkpoint  # noqa: E402

GATE = "model.layers.1.block_sparse_moe.gate.weight"


def flip(path: Path) -> None:
    """One bit in the middle of a file: the smallest of a weight."""
    data = bytearray(path.read_bytes())
    data[len(data) // 8 * 4] ^= 1
    path.write_bytes(data)


def shard_of(release: Path) -> Path:
    """The largest file of a checkpoint."""
    return max(release.glob("*.distcp"), key=lambda path: path.stat().st_size)


# --- a checkpoint that is not as it was written


@pytest.mark.parametrize("processes", [1, 2])
def test_a_flipped_bit_in_a_weight_is_found_while_it_is_copied(processes, converted, tmp_path):
    release = hf_models.copied(converted / "release", tmp_path / "checkpoint")
    flip(shard_of(release))
    with pytest.raises(
        UserError,
        match=f"{shard_of(release)} is damaged: its SHA-256 is not that of what was written",
    ):
        to_hf.convert(release, tmp_path / "out", processes=processes)
    assert os.listdir(tmp_path) == ["checkpoint"]
    if processes == 1:
        to_hf.convert(release, tmp_path / "out", verify=False)  # as asked
        assert len(hf_models.unequal(tmp_path / "out", tmp_path / "out")) == 0


def test_a_damage_in_a_small_file_is_found_by_size_too(converted, tmp_path):
    """Beside numbers whose file has the same size."""
    for name in ("run_state.json", "common.pt", ".metadata"):
        release = hf_models.copied(converted / "release", tmp_path / name)
        flip(release / name)
        assert f"{name} is damaged: its SHA-256" in integrity.problem(release, full=False)
        with pytest.raises(UserError, match=f"{name} is damaged: its SHA-256"):
            checkpoint_config.checkpoint_at(release)


def test_what_is_damaged_is_not_inspected_with_exit_code_0(converted, tmp_path, capsys):
    release = hf_models.copied(converted / "release", tmp_path / "release")
    assert checkpoint.main(["inspect", str(release)]) == FINISHED
    flip(release / "common.pt")
    assert checkpoint.main(["inspect", str(release)]) == FAULT
    assert "common.pt is damaged: its SHA-256" in capsys.readouterr().out
    (release / integrity.MANIFEST).unlink()  # Megatron-LM writes none
    assert checkpoint.main(["inspect", str(release)]) == FINISHED


def test_a_file_of_weights_that_the_manifest_does_not_have_is_refused(converted, tmp_path):
    release = hf_models.copied(converted / "release", tmp_path / "checkpoint")
    files = integrity.read_manifest(release)
    name = shard_of(release).name
    integrity.write_manifest(
        release, {other: file for other, file in files.items() if other != name}
    )
    with pytest.raises(
        UserError, match=f"{name} holds weights, and integrity.json does not have it"
    ):
        to_hf.convert(release, tmp_path / "out")
    assert os.listdir(tmp_path) == ["checkpoint"]


SPECIAL = {
    "device": lambda path: path.symlink_to("/dev/null"),
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_not_read_as_one_of_a_checkpoint(kind, tmp_path):
    (tmp_path / "__0_0.distcp").touch()
    integrity.write_manifest(tmp_path, integrity.describe([tmp_path / "__0_0.distcp"]))
    (tmp_path / "__0_0.distcp").unlink()
    SPECIAL[kind](tmp_path / "__0_0.distcp")
    for full in (True, False):
        assert integrity.problem(tmp_path, full) == f"{tmp_path / '__0_0.distcp'} is not a file"


# --- what is no number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_found_wherever_it_is(value, dtype):
    for place in (0, 500, 999):
        tensor = torch.zeros(1000, dtype=dtype)
        tensor[place] = value
        for to in (dtype, torch.float32):
            what = "NaN" if math.isnan(value) else "an infinite number"
            with pytest.raises(
                UserError, match=f"^W has {what} in it: .*--allow-nonfinite converts it"
            ):
                DtypeCast(to)("W", tensor)
            allowing = DtypeCast(to, allow_nonfinite=True)
            assert torch.equal(
                allowing("W", tensor).isfinite(), tensor.isfinite()
            ) and allowing.nonfinite == {"W"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_are_numbers_and_their_sum_need_not_be_one(dtype):
    tensor = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    for given in (tensor, -tensor, torch.empty(0, dtype=dtype)):
        assert DtypeCast(dtype)("W", given) is given


def test_a_number_that_a_dtype_does_not_have_is_refused_whatever_is_allowed():
    large = torch.tensor([1.0, -3.4e38, math.nan])
    with pytest.raises(
        UserError, match=r"^W has 3.4e\+38, and bf16 ends at 3.38953e\+38: use fp32$"
    ):
        DtypeCast(torch.bfloat16, allow_nonfinite=True)("W", large)
    with pytest.raises(UserError, match=r"^W has 70000, and fp16 ends at 65504: use fp32 or bf16$"):
        DtypeCast(torch.float16)("W", torch.tensor([7e4]))


def test_nan_is_refused_by_name_on_both_ways_and_converted_where_it_is_allowed(tmp_path, capfd):
    there = hf_models.saved("mixtral", tmp_path / "there")
    file = there / "model.safetensors"
    tensors = load_file(file)
    tensors[GATE][1, 5] = math.nan
    tensors["lm_head.weight"][0, 0] = -math.inf
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=f"{GATE} has NaN in it|lm_head.weight has an infinite number in it"
    ):
        to_megatron.convert(there, tmp_path / "megatron", processes=2)
    assert os.listdir(tmp_path) == ["there"] and "warning" not in capfd.readouterr().err
    to_megatron.convert(there, tmp_path / "megatron", processes=2, allow_nonfinite=True)
    said = f"warning: NaN or infinite numbers are in lm_head.weight, {GATE}\n"
    assert capfd.readouterr().err.endswith(said)
    with pytest.raises(UserError, match=f"{GATE} has NaN in it: a damaged or diverged model"):
        to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["megatron", "there"]
    to_hf.convert(tmp_path / "megatron", tmp_path / "back", allow_nonfinite=True)
    assert hf_models.unequal(there, tmp_path / "back") == [] and capfd.readouterr().err.endswith(
        said
    )


# --- the disk


@pytest.fixture
def small_disk(tmp_path):
    """Makes a disk of so many bytes."""
    made = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "mixtrain-test", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can make a small disk")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


WAYS = {"to Megatron-Core": to_megatron.convert, "to Hugging Face": to_hf.convert}


@pytest.mark.parametrize("part", ["half of it", "all but the last files"])
@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_runs_full_is_one_line_and_nothing_is_left(
    way, part, hub, converted, small_disk, monkeypatch
):
    source, like = (hub, converted) if way == "to Megatron-Core" else (converted, hub)
    whole = sum(path.stat().st_size for path in like.rglob("*") if path.is_file())
    disk = small_disk(whole // 2 if part == "half of it" else whole - 8192)
    before = iter([1 << 40])  # as if somebody else had filled it meanwhile
    monkeypatch.setattr(partial, "free", lambda path: next(before, shutil.disk_usage(path).free))
    with pytest.raises(Fault) as failed:
        WAYS[way](source, disk / "deep" / "out")
    words = str(failed.value)
    assert words.startswith(f"{disk / 'deep' / 'out'} was not written: ") and "\n" not in words
    assert "No space left on device; it takes " in words and "were written, and " in words
    assert os.listdir(disk) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_may_not_grow_is_one_line_and_nothing_is_left(way, hub, converted, tmp_path):
    """A limit of the shell or a quota, of whoever is not root either."""
    source = hub if way == "to Megatron-Core" else converted
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # a forked process has no others
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            WAYS[way](source, tmp_path / "out", processes=2)
        except Fault as fault:
            words = str(fault)
            code = (
                0
                if "File too large; it takes " in words
                and words.startswith(f"{tmp_path / 'out'} was not written")
                else 2
            )
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.listdir(tmp_path) == []


def test_what_the_disk_says_within_a_conversion_is_not_taken_for_another_conversion(tmp_path):
    (tmp_path / "mine").mkdir()
    for number, words in ((errno.ENOSPC, "; it takes 9 bytes, and up to "), (errno.EIO, "$")):
        with pytest.raises(Fault, match=f"out was not written: x: {os.strerror(number)}{words}"):
            with output_directory.written_whole(tmp_path / "mine" / "new" / "out", 9, 1) as writing:
                (writing / "a").write_text("12345")
                raise OSError(number, os.strerror(number), "x")
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == []
    with pytest.raises(Fault, match="; 5 were written, and [0-9,]+ were free then$"):
        with output_directory.written_whole(tmp_path / "out", 9, 1) as writing:
            (writing / "a").write_text("12345")
            raise OSError(errno.ENOSPC, "x")


def test_one_conversion_alone_writes_a_directory(tmp_path):
    with output_directory.written_whole(tmp_path / "out", 0, 0):
        with pytest.raises(UserError, match="out.writing is being written by another conversion"):
            with output_directory.written_whole(tmp_path / "out", 0, 0):
                pass
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", without)
    with output_directory.written_whole(tmp_path / "out", 0, 0) as writing:
        (writing / "a").touch()
    assert os.listdir(tmp_path / "out") == ["a"]


def test_processes_of_a_conversion_that_was_killed_do_not_hold_its_directory(tmp_path):
    (lives, says) = os.pipe()
    (asked, asks) = os.pipe()
    with partial.claim(tmp_path, "conversion"):
        child = os.fork()
        if child == 0:
            os.close(asks)  # so that it ends with this process at the latest
            os.write(says, b"x")
            os.read(asked, 1)
            os._exit(0)
        os.read(lives, 1)
    with partial.claim(tmp_path, "conversion"):
        os.write(asks, b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_what_a_killed_conversion_left_is_removed_before_the_room_is_measured(
    tmp_path, monkeypatch
):
    left = tmp_path / "out.writing"
    left.mkdir()
    (left / "half").write_text("x" * 1000)
    (left / "link").symlink_to(tmp_path)
    monkeypatch.setattr(partial, "free", lambda path: 10**9 - 10**6 * len(os.listdir(path)))
    with output_directory.written_whole(tmp_path / "out", 10**9 - output_directory.MARGIN, 0):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_the_room_for_headers_grows_with_the_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "free", lambda path: 10**8)
    with pytest.raises(
        UserError,
        match="out takes 90,000,000 bytes, and up to 24,674,304 for headers and small files",
    ):
        with output_directory.written_whole(tmp_path / "out", 9 * 10**7, 10_000):
            pass
    assert os.listdir(tmp_path) == []


def test_a_page_that_cannot_be_read_is_an_error_and_not_the_end_of_the_process(
    tmp_path, monkeypatch
):
    class Damaged(mmap.mmap):
        def madvise(self, option: int) -> None:
            raise OSError(failing, "as Linux says")

    (tmp_path / "a").write_bytes(bytes(16))
    monkeypatch.setattr(mmap, "mmap", Damaged)
    failing = errno.EFAULT
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / 'a'}'"):
        mmap_tensor.map_tensor(tmp_path / "a", 0, (4,), torch.float32)
    failing = errno.EINVAL  # an older Linux
    assert mmap_tensor.map_tensor(tmp_path / "a", 0, (4,), torch.float32).tolist() == [0.0] * 4
