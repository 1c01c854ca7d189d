"""What is copied out of a directory that somebody else made lies in it: no link leads to a file of
the reader's own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import hf_models
import pytest

from mixtrain.checkpoint import integrity
from mixtrain.data.check import check_files
from mixtrain.data.tokenizer import TOKENIZER_FILES, copy_tokenizer
from mixtrain.errors import UserError
from mixtrain.interop.convert import checkpoint_config, hf_files, to_hf, to_megatron
from mixtrain.system.links import directory_in, file_in

WORDS = json.dumps({"model": {"vocab": {"<|endoftext|>": 0, "a": 1}}})


@pytest.fixture
def secret(tmp_path) -> Path:
    """A file outside of every model directory; also a tokenizer."""
    path = tmp_path / "home" / "secret.json"
    path.parent.mkdir()
    path.write_text(WORDS)
    return path


def tokenizer_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(WORDS)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def test_a_file_and_a_link_within_the_directory_are_copied(tmp_path):
    folder = tokenizer_in(tmp_path / "model")
    (folder / "more").mkdir()
    (folder / "tokenizer.json").rename(folder / "more" / "t.json")
    (folder / "tokenizer.json").symlink_to("more/t.json")
    # the directory may be a link: it is what the user named
    (tmp_path / "alias").symlink_to(folder)
    assert copy_tokenizer(tmp_path / "alias", tmp_path / "out") == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == WORDS
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_the_hubs_cache_is_copied_and_what_lies_beside_its_blobs_is_not(tmp_path):
    hub = tmp_path / "models--x--y"
    snapshot = hub / "snapshots" / "abc"
    blobs = hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "d1").write_text(WORDS)
    (hub / "token").write_text("hf_secret")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/d1")
    assert copy_tokenizer(snapshot, tmp_path / "out") == ["tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == WORDS
    (snapshot / "vocab.json").symlink_to("../../token")
    with pytest.raises(
        UserError, match="vocab.json is a link that leads out of its directory, to .*/token; put"
    ):
        copy_tokenizer(snapshot, tmp_path / "out")
    (snapshot / "vocab.json").unlink()
    (blobs / "d2").symlink_to(hub / "token")  # by two links
    (snapshot / "vocab.json").symlink_to("../../blobs/d2")
    with pytest.raises(UserError, match="leads out of its directory, to .*/token"):
        copy_tokenizer(snapshot, tmp_path / "out")


def loop(path: Path) -> None:
    path.symlink_to("other")
    path.with_name("other").symlink_to(path)


OTHERS = {
    "is a link that leads out of its directory, to": lambda path: path.symlink_to(
        path.parents[1] / "home/secret.json"
    ),
    "is a link that leads out of its directory, to /dev/zero": lambda path: path.symlink_to(
        "/dev/zero"
    ),
    "is a link to nowhere, which is not a file": lambda path: path.symlink_to("nowhere"),
    "is a link to other, which is not a file": loop,
    "is a named pipe; a file was expected": os.mkfifo,
    "is a directory; a file was expected": Path.mkdir,
}


@pytest.mark.parametrize("problem", OTHERS)
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_what_is_no_file_of_the_directory_is_refused_by_name_and_nothing_is_copied(
    name, problem, secret, tmp_path
):
    folder = tokenizer_in(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / "vocab.json").write_text("{}")
    OTHERS[problem](folder / name)
    with pytest.raises(UserError, match=f"{folder / name} {problem}") as refused:
        copy_tokenizer(folder, tmp_path / "out")
    assert len(refused.value.problems) == 1 and not (tmp_path / "out").exists()


def test_a_place_where_nothing_lies_is_no_file_and_no_directory(tmp_path):
    assert (
        file_in(tmp_path, "tokenizer.json") is None and directory_in(tmp_path, "tokenizer") is None
    )
    assert copy_tokenizer(tmp_path, tmp_path / "out") == [] and len(TOKENIZER_FILES) > 5


def test_nothing_is_written_through_a_link_that_lies_where_a_copy_goes(secret, tmp_path):
    folder = tokenizer_in(tmp_path / "model")
    out = tmp_path / "run" / "tokenizer"
    out.mkdir(parents=True)
    secret.write_text("mine")
    (out / "tokenizer.json").symlink_to(secret)
    copy_tokenizer(folder, out)
    assert secret.read_text() == "mine" and (out / "tokenizer.json").read_text() == WORDS
    (tmp_path / "run" / "b").symlink_to(secret.parent)
    with pytest.raises(
        UserError, match="is a link or a file, where the tokenizer is to be copied to"
    ):
        copy_tokenizer(folder, tmp_path / "run" / "b")
    assert os.listdir(secret.parent) == ["secret.json"]


def test_a_tokenizer_that_is_there_already_is_left_as_it_is(tmp_path):
    """As of data.tokenizer=runs/x/tokenizer of the run x."""
    folder = tokenizer_in(tmp_path / "tokenizer")
    assert copy_tokenizer(folder, folder) == ["tokenizer.json", "tokenizer_config.json"]
    assert (folder / "tokenizer.json").read_text() == WORDS and len(os.listdir(folder)) == 2


def test_a_run_is_refused_for_its_tokenizer_before_it_is_started(secret, tmp_path):
    folder = tokenizer_in(tmp_path / "model")
    (folder / "merges.txt").symlink_to(secret)
    found = check_files(["nothing"], folder, 512, "1,0,0", (1, 0, 0))
    assert any(
        f"data.tokenizer: {folder / 'merges.txt'} is a link that leads out" in line
        for line in found
    )


def test_a_conversion_gives_no_file_of_the_readers_own_away(hub, secret, tmp_path):
    """Neither as a tokenizer nor as weights, which the link would read from another model."""
    there = hf_models.copied(hub, tmp_path / "there")
    (there / "tokenizer.json").symlink_to(secret)
    with pytest.raises(
        UserError, match=f"tokenizer.json is a link that leads out of its directory, to {secret}"
    ):
        to_megatron.convert(there, tmp_path / "out")
    weights = sorted(there.glob("*.safetensors"))[1]
    weights.rename(tmp_path / "home" / "other.safetensors")
    weights.symlink_to(tmp_path / "home" / "other.safetensors")
    with pytest.raises(
        UserError, match=f"{weights.name} is a link that leads out of its directory, to .*/other"
    ):
        hf_files.read_tensors(there)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "there"]


def test_an_export_takes_no_tokenizer_through_a_link_of_the_run(converted, secret, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    hf_models.copied(converted / "release", run / "release")
    (run / "tokenizer").symlink_to(tokenizer_in(tmp_path / "private"))
    with pytest.raises(
        UserError, match="tokenizer is a link that leads out of its directory, to .*private"
    ):
        checkpoint_config.tokenizer_of(
            run / "release", checkpoint_config.config_of(run / "release")
        )
    (run / "tokenizer").unlink()
    (tokenizer_in(run / "tokenizer") / "merges.txt").symlink_to(secret)
    with pytest.raises(UserError, match="merges.txt is a link that leads out of its directory"):
        to_hf.convert(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.writing").exists()


def test_a_tokenizer_that_a_checkpoint_only_names_is_not_given_away(converted, tmp_path):
    (tmp_path / "there").mkdir()
    there = tmp_path / "there" / "release"
    private = tokenizer_in(tmp_path / "private")
    hf_models.copied(converted / "release", there)
    state = json.loads((there / "run_state.json").read_text())
    state["config"]["data"]["tokenizer"] = str(private)
    (there / "run_state.json").write_text(json.dumps(state))
    integrity.write_manifest(
        there, integrity.describe(p for p in there.iterdir() if p.name != integrity.MANIFEST)
    )
    with pytest.raises(
        UserError, match=f"there is no tokenizer beside {there}, .* --tokenizer {private}"
    ):
        to_hf.convert(there, tmp_path / "out")
    to_hf.convert(there, tmp_path / "out", tokenizer=private)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_tokenizer_that_was_asked_for_and_is_not_there_is_refused(converted, tmp_path):
    with pytest.raises(UserError, match=f"--tokenizer {tmp_path}: no tokenizer.json there"):
        to_hf.convert(converted, tmp_path / "out", tokenizer=tmp_path)
