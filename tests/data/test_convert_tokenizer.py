"""tools/convert_tokenizer.py converts Mistral's tokenizer files with the same ids, or refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
from composing import ROOT
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from mistral_files import DATA, TEKKEN, V1, V3
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mixtrain.data import convert_tokenizer
from mixtrain.data.convert_tokenizer import convert
from mixtrain.data.tokenizer import (
    load_tokenizer,
    special_ids,
    tokenizer_eod_id,
    tokenizer_vocab_size,
)
from mixtrain.errors import UserError

sys.path.insert(0, str(ROOT / "tools"))
CODE = [path.read_text() for path in sorted((ROOT / "mixtrain").rglob("*.py"))][::10]
SIZES = {
    "tokenizer.model.v1": 32000,
    "240216.model.v2": 32768,
    "240323.model.v3": 32768,
    "241114.model.v7": 32768,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_sentencepiece_model_gives_source_code_the_same_ids_in_every_reader(name, tmp_path):
    (file,) = [path for path in DATA.iterdir() if path.name.endswith(name)]
    assert (
        convert(file, tmp_path / "made") == tokenizer_vocab_size(tmp_path / "made") == SIZES[name]
    )
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    here = load_tokenizer(tmp_path / "made")
    there = AutoTokenizer.from_pretrained(tmp_path / "made")
    for text in CODE:
        ids = own.encode(text)
        assert (
            here.encode(text, add_special_tokens=False).ids == ids == there(text)["input_ids"][1:]
        )
        assert here.decode(ids) == text
    # for llama.cpp
    assert (tmp_path / "made" / "tokenizer.model").read_bytes() == file.read_bytes()
    assert special_ids(tmp_path / "made") == {"bos_token_id": 1, "eos_token_id": 2}
    assert there.bos_token_id == there("x")["input_ids"][0] == 1 and there.eos_token_id == 2


def test_a_control_token_of_a_sentencepiece_model_is_a_special_token(tmp_path):
    convert(V3, tmp_path / "made")
    text = "[INST] x [/INST]"
    assert {3, 4} <= set(
        load_tokenizer(tmp_path / "made", parse_special_tokens=True).encode(text).ids
    )
    assert not {3, 4} & set(load_tokenizer(tmp_path / "made").encode(text).ids)


def test_a_tekken_json_gives_the_same_ids(tmp_path):
    assert convert(TEKKEN, tmp_path / "made") == 131072
    own = Tekkenizer.from_file(TEKKEN)
    here = load_tokenizer(tmp_path / "made")
    for text in CODE[::3]:
        assert here.encode(text, add_special_tokens=False).ids == own.encode(
            text, bos=False, eos=False
        )
    assert tokenizer_eod_id(tmp_path / "made") == own.eos_id


def test_a_file_whose_merges_come_in_another_order_is_refused_and_nothing_is_written(
    tmp_path, monkeypatch
):
    """Four merges of spaces come first, as in an earlier converter of the same file."""
    right = convert_tokenizer._merges

    def other(pieces):
        merges = list(right(pieces))
        spaces = [merge for merge in merges if not set("".join(merge)) - {convert_tokenizer.SPACE}][
            :4
        ]
        return [*spaces, *(merge for merge in merges if merge not in spaces)]

    monkeypatch.setattr(convert_tokenizer, "_merges", other)
    with pytest.raises(
        UserError, match="cannot be converted exactly: .* and its own library gives "
    ):
        convert(V1, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def trained(folder: Path, **options) -> Path:
    model = io.BytesIO()
    text = (" ".join(CODE[:20])).splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=600,
        minloglevel=2,
        hard_vocab_limit=False,
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            **options,
        },
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


OTHER = {
    "its model_type is not BPE": {"model_type": "unigram"},
    "byte_fallback is false": {"byte_fallback": False},
    "its normalizer is nmt_nfkc, not identity": {"normalization_rule_name": "nmt_nfkc"},
    "it removes spaces": {"remove_extra_whitespaces": True},
    "it puts no space before a text": {"add_dummy_prefix": False},
}


@pytest.mark.parametrize("reason", OTHER)
def test_a_sentencepiece_model_of_another_kind_is_refused_by_what_is_other(reason, tmp_path):
    with pytest.raises(UserError, match=f"tokenizer.model: {reason}; only a byte-pair model"):
        convert(trained(tmp_path, **OTHER[reason]), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_model_of_ones_own_of_the_same_kind_is_converted(tmp_path):
    file = trained(tmp_path)
    convert(file, tmp_path / "made")
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    here = load_tokenizer(tmp_path / "made")
    assert all(here.encode(text, add_special_tokens=False).ids == own.encode(text) for text in CODE)


def test_what_is_no_tokenizer_file_is_refused_by_the_tool_with_exit_code_2(tmp_path, capsys):
    from convert_tokenizer import main

    from mixtrain.cli import run

    (tmp_path / "tokenizer.model").write_bytes(V1.read_bytes()[:1000])
    (tmp_path / "tekken.json").write_text(json.dumps({"config": {}, "vocab": []}))
    (tmp_path / "broken.json").write_text("{")
    wrong = {
        "gone.model": "gone.model: no such file",
        "tokenizer.model": "is not a sentencepiece model, or it is damaged",
        "tekken.json": "config.default_num_special_tokens is missing",
        "broken.json": "not valid JSON",
    }
    for name, why in wrong.items():
        assert run(main, [str(tmp_path / name), str(tmp_path / "made")]) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "made").exists()
    assert run(main, [str(V1), str(tmp_path)]) == 2
    assert "is there already; give a new directory" in capsys.readouterr().err
    assert run(main, [str(V1), str(tmp_path / "broken.json" / "made")]) == 2
    assert "made.writing cannot be made (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, module, package",
    [
        (V1, "sentencepiece", "sentencepiece"),
        (TEKKEN, "mistral_common.tokens.tokenizers.tekken", "mistral-common"),
    ],
)
def test_a_missing_library_is_said_with_the_command_that_installs_it(
    file, module, package, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=f"{package} is needed to convert it .*; type: pip install {package}$"
    ):
        convert(file, tmp_path / "made")


def test_what_is_written_is_what_the_tokenizers_library_writes_again(tmp_path):
    convert(V1, tmp_path / "made")
    path = tmp_path / "made" / "tokenizer.json"
    assert Tokenizer.from_file(str(path)).to_str(pretty=True) == path.read_text()


def test_output_of_a_killed_conversion_is_cleared_and_a_folder_with_other_files_is_not(tmp_path):
    left = tmp_path / "made.writing"
    left.mkdir()
    (left / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis.txt was not written by an interrupted run"):
        convert(V1, tmp_path / "made")
    assert (left / "thesis.txt").read_text() == "mine"
    (left / "thesis.txt").rename(left / "tokenizer.json")
    convert(V1, tmp_path / "made")
    assert not left.exists() and (tmp_path / "made" / "tokenizer.json").stat().st_size > 1000
