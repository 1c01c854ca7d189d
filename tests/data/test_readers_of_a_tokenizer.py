"""Mixtral's published tokenizer: all readers (data, generation, serving) give the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_files import V1, as_published
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from mixtrain.data.json_lines import JsonLines
from mixtrain.data.preprocess import preprocess
from mixtrain.data.tokenizer_test_texts import tokenizer_test_texts
from mixtrain.errors import UserError
from mixtrain.interop.convert import to_hf, to_megatron
from mixtrain.interop.generate.tokenization import PromptTokenizer

# a text of spaces alone is not a document
TEXTS = [text for text in tokenizer_test_texts() if text.strip()]
CHATS = [text for text in TEXTS if "\n" in text or "return" in text][:40]
SIZES = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=2,
    vocab_size=32000,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return as_published(tmp_path_factory.mktemp("published") / "tokenizer")


@pytest.fixture(scope="module")
def exported(published, tmp_path_factory) -> Path:
    """A small model with the tokenizer, converted from Hugging Face to Megatron and back."""
    folder = tmp_path_factory.mktemp("model")
    MixtralForCausalLM(MixtralConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder / "there")
    for path in published.iterdir():
        (folder / "there" / path.name).write_bytes(path.read_bytes())
    to_megatron.convert(folder / "there", folder / "megatron")
    to_hf.convert(folder / "megatron", folder / "back")
    return folder / "back"


@pytest.fixture(scope="module")
def mistrals() -> list[list[int]]:
    """Return the ids of each text from Mistral's own package."""
    encode = SentencePieceTokenizer(V1).encode
    return [encode(text, bos=False, eos=False) for text in TEXTS]


def test_a_data_set_read_back_has_the_ids_of_mistrals_own_package(published, mistrals, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    preprocess(JsonLines(path, "text"), tmp_path / "set", published, log=lambda line: None)
    data = IndexedDataset(str(tmp_path / "set"))
    assert len(TEXTS) > 260 and [data[n].tolist() for n in range(len(data))] == [
        [*ids, 2] for ids in mistrals
    ]


def test_a_prompt_has_the_ids_of_mistrals_own_package(published, mistrals):
    text = PromptTokenizer(str(published), [])
    assert [text.encode(each, chat=False) for each in TEXTS] == [[1, *ids] for ids in mistrals]
    assert text.encode("    return", chat=False) == [1, 260, 604] and text.end_tokens() == {2}


def test_an_exported_model_gives_a_text_the_same_ids(exported, mistrals):
    encode = AutoTokenizer.from_pretrained(exported)
    # llama.cpp reads the scores from it
    assert (exported / "tokenizer.model").read_bytes() == V1.read_bytes()
    assert [encode(each)["input_ids"] for each in TEXTS] == [[1, *ids] for ids in mistrals]


def test_a_chat_has_the_ids_of_an_exported_model_and_a_control_token_in_it_is_one(
    published, exported
):
    here = PromptTokenizer(str(published), [])
    there = AutoTokenizer.from_pretrained(exported)
    for said in [*CHATS, "a</s>b", "<s>[INST] x [/INST]"]:
        ids = there.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True
        )["input_ids"]
        assert here.encode(said, chat=True) == ids
    assert (
        here.encode("a</s>b", chat=True).count(2) == here.encode("a</s>b", chat=False).count(2) == 1
    )


SETTINGS = [
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": None, "add_eos_token": True},
    {"add_bos_token": ..., "add_eos_token": ...},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
    {
        "bos_token": {
            "__type": "AddedToken",
            "content": "<s>",
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    },
]


@pytest.mark.parametrize("change", SETTINGS, ids=str)
def test_what_is_put_around_a_prompt_is_what_an_exported_model_puts(exported, change, tmp_path):
    for path in exported.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    there = AutoTokenizer.from_pretrained(tmp_path)
    here = PromptTokenizer(str(tmp_path), [])
    for text in ("    return", "a </s> b", "<s>x"):
        assert here.encode(text, chat=False) == there(text)["input_ids"]
        ids = here.encode(text, chat=False)
        assert here.continuation([], ids) == there.decode(ids, skip_special_tokens=True)


def test_a_chat_template_in_a_file_of_its_own_and_one_of_several_are_transformers(
    published, exported, tmp_path
):
    said = [{"role": "user", "content": "  x"}]
    for name, several in (("several", True), ("own", False)):
        folder = tmp_path / name
        folder.mkdir()
        for path in exported.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        path = folder / "tokenizer_config.json"
        templates = [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ eos_token }}a"},
        ]
        path.write_text(
            json.dumps(
                json.loads(path.read_text()) | ({"chat_template": templates} if several else {})
            )
        )
        if not several:
            (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
        ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            said, add_generation_prompt=True
        )["input_ids"]
        assert PromptTokenizer(str(folder), []).encode("  x", chat=True) == ids


def test_a_tokenizer_json_that_is_none_is_refused_by_its_path(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(UserError, match="tokenizer.json: "):
        PromptTokenizer(str(tmp_path), [])
