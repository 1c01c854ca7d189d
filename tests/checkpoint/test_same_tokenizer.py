"""Weights and text must use one tokenizer: another is refused by name before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from composing import config_of
from hf_models import saved
from test_generate_settings import state_of
from test_parity import TINY
from test_resume import start
from tokenizers import Tokenizer

from mixtrain.checkpoint.same_tokenizer import problem, same_ids, with_digest
from mixtrain.data.preprocess import preprocess
from mixtrain.data.sources import Files
from mixtrain.data.tokenizer import train_bpe
from mixtrain.errors import FINISHED, REFUSED, UserError
from mixtrain.interop.convert import to_hf, to_megatron
from mixtrain.interop.generate import tokenizer_lookup

LIBRARY = Path(json.__file__).parent
ONE_RANK = [word for word in TINY if word != "data=mock"] + [
    "data=indexed", "router=none", "model.vocab_size=320", "parallel=ep1", "data.seq_length=32",
]  # fmt: skip
ACKNOWLEDGED = "checkpoint.acknowledge_differences=[data.tokenizer]"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Two tokenizers of one size, one of them also in another format, and a data set of each."""
    folder = tmp_path_factory.mktemp("made")
    for name, text in {"one": "decoder.py", "other": "scanner.py"}.items():
        train_bpe(iter([(LIBRARY / text).read_text()]), 300, folder / name)
    shutil.copytree(folder / "one", folder / "again")
    written = json.loads((folder / "one" / "tokenizer.json").read_text())
    # as older versions write it
    written["model"] |= {"merges": [" ".join(merge) for merge in written["model"]["merges"]]}
    written["truncation"] = {
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    (folder / "again" / "tokenizer.json").write_text(json.dumps(written, indent=1, sort_keys=True))
    for name in ("one", "other", "again"):
        source = Files(LIBRARY, ["decoder.py", "encoder.py", "scanner.py"])
        preprocess(source, folder / f"{name}-data", folder / name, log=lambda line: None)
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def words_of(tokenizer: Path) -> list[str]:
    return [
        f"data.data_path=[{tokenizer}-data]",
        f"data.tokenizer={tokenizer}",
        "data.split='100,0,0'",
    ]


def test_a_tokenizer_in_another_format_is_the_same_and_one_of_other_merges_or_tokens_is_not(
    made, tmp_path
):
    assert same_ids(made["one"], made["again"]) and with_digest(made["one"]) != with_digest(
        made["again"]
    )
    assert not same_ids(made["one"], made["other"])
    more = Tokenizer.from_file(str(made["one"] / "tokenizer.json"))
    more.add_special_tokens(["<|im_start|>"])
    shutil.copytree(made["one"], tmp_path / "more")
    more.save(str(tmp_path / "more" / "tokenizer.json"))
    assert not same_ids(made["one"], tmp_path / "more")


@pytest.fixture(scope="module")
def converted(made, tmp_path_factory) -> Path:
    """A model of transformers with the first tokenizer, as a checkpoint."""
    folder = tmp_path_factory.mktemp("converted")
    there = saved("mixtral", folder / "there")
    for path in made["one"].iterdir():
        shutil.copy(path, there)
    to_megatron.convert(there, folder / "out")
    return folder / "out"


def test_weights_are_not_trained_on_the_token_ids_of_another_tokenizer(made, converted):
    base = [*ONE_RANK, f"checkpoint.load_weights={converted}"]
    found = problem(config_of(*base, *words_of(made["other"])), made["other"])
    assert with_digest(made["other"]) in found and with_digest(converted / "tokenizer") in found
    assert found.endswith("or name data.tokenizer in checkpoint.acknowledge_differences")
    for name in ("one", "again"):
        assert problem(config_of(*base, *words_of(made[name])), made[name]) is None
    assert problem(config_of(*base, *words_of(made["other"]), ACKNOWLEDGED), made["other"]) is None


def test_a_run_does_not_go_on_with_another_tokenizer_and_keeps_its_own(made, tmp_path):
    overrides = [*ONE_RANK, "trainer.limit_val_batches=0", "checkpoint.save_interval=1"]
    run_dir, codes, log = start(tmp_path, *overrides, *words_of(made["one"]), "trainer.max_steps=1")
    assert codes == {FINISHED}, log
    _, codes, log = start(tmp_path, *overrides, *words_of(made["other"]), "trainer.max_steps=2")
    assert (
        codes == {REFUSED}
        and "is not the tokenizer of" in log
        and with_digest(made["other"]) in log
    )
    assert same_ids(run_dir / "tokenizer", made["one"]) and not same_ids(
        run_dir / "tokenizer", made["other"]
    )
    _, codes, log = start(tmp_path, *overrides, *words_of(made["again"]), "trainer.max_steps=2")
    assert codes == {FINISHED}, log


def test_a_model_is_not_exported_with_another_tokenizer_unless_it_is_said(
    made, converted, tmp_path
):
    with pytest.raises(
        UserError,
        match=r"--tokenizer .*/other \(sha256 \w{12}\) is not the tokenizer of .*/release, ",
    ):
        to_hf.convert(converted, tmp_path / "out", tokenizer=made["other"])
    assert not (tmp_path / "out").exists()
    to_hf.convert(converted, tmp_path / "again", tokenizer=made["again"])
    to_hf.convert(converted, tmp_path / "out", tokenizer=made["other"], allow_other_tokenizer=True)
    assert same_ids(tmp_path / "out", made["other"])


def test_a_model_is_not_asked_with_another_tokenizer_unless_it_is_said(made, converted):
    run = state_of(*TINY, "router=none", "parallel.expert_model_parallel_size=1")
    checkpoint = converted / "release"
    with pytest.raises(
        UserError, match="is not the tokenizer of .* leave it out, or add --allow-other-tokenizer$"
    ):
        tokenizer_lookup.find_directory(str(made["other"]), checkpoint, run, 320)
    for name in ("one", "again"):
        assert tokenizer_lookup.find_directory(str(made[name]), checkpoint, run, 320) == str(
            made[name]
        )
    assert tokenizer_lookup.find_directory(str(made["other"]), checkpoint, run, 320, True) == str(
        made["other"]
    )
