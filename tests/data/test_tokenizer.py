import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import regex

from mixtrain.data.check import check_files
from mixtrain.data.tokenizer import (
    load_tokenizer,
    tokenizer_eod_id,
    tokenizer_vocab_size,
    train_bpe,
)
from mixtrain.data.tokenizer_test_texts import tokenizer_test_texts
from mixtrain.errors import UserError

TEXT = "def f(x):\r\n\treturn 'größer 日本 🙂' + x , it 's .  \n\n\x00 <|endoftext|>\n"


def test_every_text_comes_back_from_its_tokens(tokenizer):
    ids = load_tokenizer(tokenizer).encode(TEXT, add_special_tokens=False).ids
    assert load_tokenizer(tokenizer).decode(ids) == TEXT


def test_a_trained_tokenizer_has_the_size_asked_for_and_ends_documents_with_id_0(tokenizer):
    assert tokenizer_vocab_size(tokenizer) == 512
    assert tokenizer_eod_id(tokenizer) == 0
    assert load_tokenizer(tokenizer).id_to_token(0) == "<|endoftext|>"


def test_text_that_spells_the_end_of_document_token_ends_no_document(tokenizer):
    assert 0 not in load_tokenizer(tokenizer).encode(TEXT).ids


def test_the_same_text_gives_the_same_tokenizer_in_another_process(tokenizer, source, tmp_path):
    program = (
        "import sys\n"
        "from mixtrain.data.sources import Files\n"
        "from mixtrain.data.tokenizer import train_bpe\n"
        "documents = Files(sys.argv[1], sys.argv[3:]).documents()\n"
        "train_bpe((document.text() for document in documents), 512, sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", program, source.root, tmp_path, *source.names],
        env=environment,
        check=True,
        timeout=60,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer / name).read_bytes()


def test_a_trained_tokenizer_cuts_texts_as_gpt_2_does(tokenizer):
    """llama.cpp supports this pre-tokenizer under GPT-2's name."""
    gpt_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    cut = load_tokenizer(tokenizer).pre_tokenizer.pre_tokenize_str
    for text in [*tokenizer_test_texts(), TEXT, "I'll we'VE 3.14 x1y2"]:
        assert [text[begin:end] for _, (begin, end) in cut(text)] == regex.findall(gpt_2, text)


def test_too_little_text_for_the_vocabulary_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(UserError, match=r"vocabulary of 512 tokens: it holds only 26\d;"):
        train_bpe(iter(["abababab abab"] * 3), 512, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


def test_a_vocabulary_without_room_for_every_byte_is_refused(tmp_path):
    with pytest.raises(UserError, match="vocabulary size 256 .* smallest is 257"):
        train_bpe(iter(["text"]), 256, tmp_path)


def test_added_tokens_count_towards_the_vocabulary(tmp_path):
    write(
        tmp_path,
        {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 9, "content": "<eos>"}]},
    )
    assert tokenizer_vocab_size(tmp_path) == 10
    assert tokenizer_eod_id(tmp_path) == 9


def test_a_vocabulary_written_as_a_list_counts_by_position(tmp_path):
    write(tmp_path, {"model": {"vocab": [["<unk>", 0.0], ["<eos>", 0.0], ["a", -1.5]]}})
    assert tokenizer_vocab_size(tmp_path) == 3
    assert tokenizer_eod_id(tmp_path) == 1


def test_an_end_of_document_token_written_as_an_object_is_understood(tmp_path):
    write(
        tmp_path,
        {"model": {"vocab": {"a": 0, "<eos>": 1}}},
        {"eos_token": {"content": "<eos>", "lstrip": False}},
    )
    assert tokenizer_eod_id(tmp_path) == 1


@pytest.mark.parametrize(
    "config, reason", [({}, "names no eos_token"), ({"eos_token": "</s>"}, "'</s>' is not in")]
)
def test_a_tokenizer_without_an_end_of_document_token_is_refused(tmp_path, config, reason):
    write(tmp_path, {"model": {"vocab": {"a": 0}}}, config)
    with pytest.raises(UserError, match=reason):
        tokenizer_eod_id(tmp_path)


@pytest.mark.parametrize(
    "content, reason", [("{", "not valid JSON"), ("[]", "not an object"), ("{}", "no vocabulary")]
)
def test_a_broken_tokenizer_file_is_refused_by_name(tmp_path, content, reason):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=f"tokenizer.json.*: .*{reason}"):
        tokenizer_vocab_size(tmp_path)


def test_a_saved_length_limit_cuts_no_document_short(tokenizer, tmp_path):
    limited = json.loads((tokenizer / "tokenizer.json").read_text())
    limited["truncation"] = {
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    write(tmp_path, limited)
    assert load_tokenizer(tmp_path).encode(TEXT).ids == load_tokenizer(tokenizer).encode(TEXT).ids


def test_transformers_and_megatron_load_the_directory_and_agree(tokenizer):
    from megatron.core.tokenizers import MegatronTokenizer
    from transformers import AutoTokenizer

    text = TEXT.replace("<|endoftext|>", "")
    ids = load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == 0 and len(theirs) == 512
    megatrons = MegatronTokenizer.from_pretrained(str(tokenizer), {"library": "huggingface"})
    assert (megatrons.vocab_size, megatrons.eod, megatrons.tokenize(text)) == (512, 0, ids)


def test_reading_a_tokenizer_imports_neither_torch_nor_numpy_nor_transformers(tokenizer):
    program = (
        "import sys; from mixtrain.data.check import check_files\n"
        "check_files(['none'], sys.argv[1], 512)\n"
        "heavy = ('torch', 'numpy', 'transformers', 'tokenizers')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tokenizer], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


NO_DIRECTORY = {
    "mistralai/Mixtral-8x7B-v0.1": "type: hf download mistralai/Mixtral-8x7B-v0.1 --include"
    " 'tokenizer*' --local-dir Mixtral-8x7B-v0.1  and give"
    " Mixtral-8x7B-v0.1",
    "gone/far/away": "gone/far/away: no such directory; give a Hugging Face tokenizer directory",
    "there/tokenizer.json": "there/tokenizer.json is a file; give its directory, there",
    "there/tokenizer.model": "type: python tools/convert_tokenizer.py there/tokenizer.model"
    " OUT_DIR  and give OUT_DIR",
    "mistrals": "no tokenizer.json there; type: python tools/convert_tokenizer.py"
    " mistrals/tokenizer.model.v3 OUT_DIR",
    "tekken": "no tokenizer.json there; type: python tools/convert_tokenizer.py tekken/tekken.json"
    " OUT_DIR",
    "older": "no tokenizer.json there; transformers makes it of vocab.json: python -c ",
    "empty": "empty: no tokenizer.json there; give a Hugging Face tokenizer directory",
}


@pytest.mark.parametrize("given", NO_DIRECTORY)
def test_what_is_no_tokenizer_directory_is_refused_with_the_command_that_makes_one(
    given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in (
        "there/tokenizer.json",
        "there/tokenizer.model",
        "mistrals/tokenizer.model.v3",
        "tekken/tekken.json",
        "older/vocab.json",
        "empty/README.md",
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    for ask in (tokenizer_vocab_size, load_tokenizer, tokenizer_eod_id):
        with pytest.raises(UserError) as caught:
            ask(Path(given))
        assert NO_DIRECTORY[given] in str(caught.value)
    assert NO_DIRECTORY[given] in check_files(["none"], Path(given), 512)[-1]


def write(directory, tokenizer: dict, config: dict | None = None) -> None:
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"eos_token": "<eos>"} if config is None else config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
