"""One reader for JSON of others: bounded, checked, and every file that the package reads goes
through it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest
from composing import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtrain.checkpoint import integrity, state
from mixtrain.data import check, tokenizer
from mixtrain.data.documents import Document, UnreadableDocument
from mixtrain.errors import UserError
from mixtrain.interop.convert.hf_config import from_hugging_face
from mixtrain.interop.generate.request import read_prompts
from mixtrain.system import status, untrusted_json
from mixtrain.system.untrusted_json import Count, InvalidJson, Name, integer
from mixtrain.training import plot
from mixtrain.training.run_directory import attempts_problem, previous_status
from mixtrain.training.sinks import metrics_jsonl

STATE = {"step": 20, "consumed_samples": 0, "schedule_steps": 0, "optimizer_steps": 0}
# where a process reads what it has made itself, or a child of its own
OWN = {
    "mixtrain/engine/forked_ranks.py",
    "mixtrain/proof/drill/runs.py",
    "mixtrain/proof/drill/scenarios.py",
    "tools/mutants.py",
    "mixtrain/checkpoint/same_tokenizer.py",
}


class Inner(TypedDict):
    size: Count
    note: NotRequired[str | None]


@pytest.mark.parametrize(
    "text, schema, message",
    [
        ("[" * 100_000, Any, "nested more than 64 deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, Any, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, Any, "nested more than 64 deep"),
        ("NaN", Any, "NaN is not a JSON number"),
        ("[-Infinity]", Any, "-Infinity is not a JSON number"),
        ("[1e999]", Any, "the number 1e999 is too large"),
        ("9" * 100_000, Any, "a number of 100,000 digits; 40 are read at most"),
        ('{"a": {"b": 1, "b": 2}}', Any, 'the key "b" occurs twice'),
        (b'{"a": "\xff"}', Any, "not UTF-8 at byte 7"),
        ("", Any, "not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        ("5", dict[str, Any], "5 is not an object"),
        ('{"a": {"size": -1}}', dict[Name, Inner], "a.size = -1 is not a whole number from 0"),
        ('{"a": {"size": true}}', dict[Name, Inner], "a.size = true is not a whole number"),
        ('{"a": {"size": 20.0}}', dict[Name, Inner], "a.size = 20.0 is not a whole number"),
        ('{"a": {"size": 1, "note": 5}}', dict[Name, Inner], "a.note = 5 is not text or null"),
        ('{"a": {}}', dict[Name, Inner], "a.size is missing"),
        (
            '{"a\\u001b": {"size": 1}}',
            dict[Name, Inner],
            'the key "a\\u001b" is not text without control characters',
        ),
        ('{"a": [1, "x"]}', dict[str, list[int] | str], 'a[1] = "x" is not a whole number'),
        ("[1, 2, 3]", tuple[Count, Count], "a list of 3 is not a list of 2"),
        ("9", integer(0, 8), "9 is not a whole number from 0 to 8"),
        (json.dumps("x" * 10_000), int, f'"{"x" * 59} ... is not a whole number'),
    ],
)
def test_what_is_wrong_with_a_text_is_said_in_one_short_line(text, schema, message):
    with pytest.raises(InvalidJson) as refused:
        untrusted_json.parse(text, schema)
    assert refused.value.problems == (message,)


def test_what_fits_is_given_as_it_is():
    assert untrusted_json.parse('{"a": {"size": 1, "note": null, "new": [1]}}', dict[Name, Inner])[
        "a"
    ]["new"] == [1]
    assert untrusted_json.parse("[" * 64 + "]" * 64, Any)
    assert (
        untrusted_json.parse('{"most": 1000000000000000019884624838656}')["most"] > 10**30
    )  # transformers' "no limit"


def test_of_a_line_of_a_corpus_only_the_key_that_is_read_must_be_right():
    text = b'{"text": "x", "score": NaN, "id": 1e999, "tag": 1, "tag": 2}'
    assert untrusted_json.parse(text, Any, only="text")["text"] == "x"
    with pytest.raises(InvalidJson, match='the key "text" occurs twice'):
        untrusted_json.parse(b'{"text": "x", "text": "y"}', Any, only="text")


def test_a_file_is_read_only_if_it_is_one_and_of_a_size_that_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_text('"' + "x" * 100 + '"')
    for name, message in {
        "pipe": "is refused: not a regular file",
        "zero": "is refused: not a regular file",
        "large": "is refused: larger than 100 bytes",
        "none": "is missing: why",
        ".": "cannot be read (Is a directory)",
    }.items():
        with pytest.raises(InvalidJson) as refused:
            untrusted_json.read(tmp_path / name, most=100, missing="why")
        assert str(refused.value).startswith(f"{tmp_path / name} {message}"), name


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted_json, "LINE", 8)
    (tmp_path / "lines").write_bytes(b"12345678901234567890\r\n12345678\nab")
    assert list(untrusted_json.lines(tmp_path / "lines")) == [
        (1, b"12345678"),
        (2, b"12345678"),
        (3, b"ab"),
    ]


def test_json_of_others_is_read_in_one_place():
    found = set()
    for path in [
        *(ROOT / "mixtrain").rglob("*.py"),
        *(ROOT / "tools").glob("*.py"),
        ROOT / "train.py",
    ]:
        if re.search(r"\bjson\.loads?\(|JSONDecoder|from json import", path.read_text()):
            found.add(path.relative_to(ROOT).as_posix())
    assert found == OWN | {"mixtrain/system/untrusted_json.py"}


# Those who read


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": "20"}, 'step = "20" is not a whole number'),
        ({"step": -1}, "step = -1 is not a whole number from 0"),
        ({"step": None}, "step = null is not a whole number"),
        ({"config": {"run_dir": "${oc.env:SECRET}"}}, "config = an object of 1 is not a resolved"),
        ({"config": []}, "config = a list of 0 is not an object"),
        ({"layout": {"world_size": "8"}}, 'layout.world_size = "8" is not a whole number'),
        ({"data": {"corpus": 5}}, "data.corpus = 5 is not text"),
    ],
)
def test_a_state_of_a_run_with_another_type_is_refused_by_its_key(tmp_path, change, message):
    (tmp_path / state.NAME).write_text(json.dumps(STATE | change))
    with pytest.raises(ValueError) as refused:
        state.read(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / state.NAME} is damaged: {message}")


@pytest.mark.parametrize(
    "text",
    [
        '{"files":' * 50_000,
        '{"files": {"a": {"size": "1", "sha256": "0"}}}',
        '{"files": {"../a": {}}}',
        '{"files": {}}',
        '{"files": {"": {}}}',
        "5",
        "null",
        '{"files": []}',
        '{"files": {"a": {"size": 1e30, "sha256": 5}}}',
    ],
)
def test_a_broken_manifest_is_a_damage_of_its_checkpoint_and_no_more(tmp_path, text):
    (tmp_path / integrity.MANIFEST).write_text(text)
    assert integrity.problem(tmp_path, full=True).startswith(
        f"{tmp_path / integrity.MANIFEST} is damaged: "
    )


@pytest.mark.parametrize(
    "text", ["5", "[]", '{"step": "1"}', '{"before": 5}', "{" * 100_000, "[" * 100_000, "\x00"]
)
def test_a_status_that_is_none_is_as_if_there_were_no_run(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert previous_status(str(tmp_path)) == {}
    (tmp_path / "attempts.jsonl").write_text(
        f'{{"step": 0}}\n{text}\n{{"step": 0, "before": null}}\n'
    )
    # the last line alone
    assert attempts_problem(str(tmp_path), 0, 1).startswith("1 runs in a row")


def test_a_run_goes_on_beside_a_line_that_is_no_record_and_the_file_is_kept(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n5\n{"step": "2"}\n{"step": 2}\n{"step": 3}\n{"ste')
    message = metrics_jsonl.cut_back(metrics, 2)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert message == (
        f"line 2 and 1 more of {metrics} is not a record (5 is not an object) and was removed;"
        " metrics.jsonl.damaged is the original file"
    )
    assert (tmp_path / "metrics.jsonl.damaged").read_text().startswith('{"step": 1}\n5\n')


def test_half_of_a_line_that_a_killed_run_has_left_goes_without_a_word(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    assert metrics_jsonl.cut_back(tmp_path / "metrics.jsonl", 2) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "vocab, added, message",
    [
        ([["a", 0.0]], [{"content": "b"}], "added_tokens[0].id is missing"),
        ([["a", 0.0]], 5, "added_tokens = 5 is not a list or null"),
        ({"a": "0"}, [], 'model.vocab.a = "0" is not a whole number'),
        ({"a": -1}, [], "model.vocab.a = -1 is not a whole number from 0 to 2,147,483,647"),
        ([["a"]], [], "model.vocab[0] = a list of 1 is not a list of 2"),
        ([[["a"], 0.0]], [], "model.vocab[0][0] = a list of 1 is not text"),
    ],
)
def test_a_vocabulary_of_other_types_is_refused_by_its_place(tmp_path, vocab, added, message):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocab}, "added_tokens": added})
    )
    with pytest.raises(UserError) as refused:
        tokenizer.tokenizer_vocab_size(tmp_path)
    assert str(refused.value) == f"{tmp_path / 'tokenizer.json'} is damaged: {message}"


def test_a_special_token_that_is_a_list_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["a"]}')
    for ask in (tokenizer.tokenizer_eod_id, tokenizer.special_ids):
        with pytest.raises(
            UserError, match="eos_token = a list of 1 is not text or an object or null"
        ):
            ask(tmp_path)


# Whatever stands in a file, its readers end with what they promise

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**30, "${a}"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
SHA = "0" * 64
# What the readers know: a valid file, of which the fuzzer changes a part.
VALID = {
    "integrity.json": {"format": 1, "files": {"a": {"size": 1, "sha256": SHA}}},
    "run_state.json": STATE
    | {"config": {"seed": 1}, "layout": {"world_size": 1}, "data": {"train": "x"}},
    "status.json": {
        "state": "stopped",
        "step": 1,
        "max_steps": 2,
        "reason": "",
        "before": {"state": None},
    },
    "metrics.jsonl": {"step": 1, "lm_loss": 1.0, "tokens_per_expert": [[1, 2], [3, 4]]},
    "attempts.jsonl": {"step": 0, "before": {"state": "failed", "reason": "x"}},
    "tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": 1}]},
    "tokenizer_config.json": {"eos_token": "a", "pad_token": {"content": "b"}},
    "data.json": {"max_token_id": 1, "tokenizer_sha256": SHA, "tokenizer": "x"},
    "prompts.jsonl": {"prompt": "x"},
    "config.json": {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 4,
        "intermediate_size": 64,
        "rope_theta": 1e6,
    },
}


@st.composite
def damaged(draw) -> tuple[str, bytes]:
    """(name of a file, what stands in it): a valid one with a value changed, another value, or
    broken bytes.
    """
    name = draw(st.sampled_from(sorted(VALID)))
    value: Any = json.loads(json.dumps(VALID[name]))
    place = value
    path = []
    while isinstance(place, (dict, list)) and place and (not path or draw(st.booleans())):
        path.append(
            draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        )
        place = place[path[-1]]
    inside = value
    for part in path[:-1]:
        inside = inside[part]
    inside[path[-1]] = draw(VALUES)
    data = json.dumps(draw(st.sampled_from([value, value, value, place]))).encode()
    if draw(st.integers(0, 4)) == 0:
        cut = draw(st.integers(0, len(data)))
        data = (
            data[:cut]
            + draw(st.binary(max_size=6) | st.just(b"[" * 5000))
            + data[cut + draw(st.integers(0, 3)) :]
        )
    return name, data


def read_all(folder: Path, name: str) -> None:
    """Call every reader of a file as its callers do; only the promised exceptions pass."""
    path = folder / name
    if name == "integrity.json":
        assert isinstance(integrity.problem(folder, full=True), str)
    elif name == "run_state.json":
        with contextlib.suppress(ValueError, UserError):
            untrusted_tree(state.read(folder))
    elif name == "status.json":
        assert isinstance(previous_status(str(folder)), dict)
        with contextlib.suppress(InvalidJson):
            status.read_status(folder)
        attempts_problem(str(folder), 0, 1)
    elif name == "metrics.jsonl":
        plot._load([*plot.read(path), *[VALID[name]]][-1:])
        assert isinstance(metrics_jsonl.cut_back(path, 5), str)
    elif name == "attempts.jsonl":
        attempts_problem(str(folder), 0, 1)
    elif name.startswith("tokenizer"):
        for ask in (
            tokenizer.tokenizer_vocab_size,
            tokenizer.tokenizer_eod_id,
            tokenizer.special_ids,
        ):
            with contextlib.suppress(UserError):
                ask(folder)
    elif name == "data.json":
        assert isinstance(check._description_problems(str(folder / "data"), folder, 100), list)
    elif name == "prompts.jsonl":
        with contextlib.suppress(UserError):
            read_prompts(str(path))
        with contextlib.suppress(UnreadableDocument):
            Document("x", path.read_bytes(), "prompt").text()
    else:
        with contextlib.suppress(UserError):
            from_hugging_face(untrusted_json.read(path))


def untrusted_tree(run: state.RunState):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.create(run.config)
    except OmegaConfBaseException as error:  # as resume.changed_since has it
        raise ValueError from error


def fuzz(folder: Path, examples: int, always_the_same: bool) -> None:
    for name, value in VALID.items():
        (folder / name).write_text(json.dumps(value) + "\n")

    @settings(max_examples=examples, deadline=None, database=None, derandomize=always_the_same)
    @given(damaged())
    def attack(file: tuple[str, bytes]) -> None:
        name, data = file
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        try:
            read_all(folder, name)
        finally:
            (folder / name).write_bytes(kept)

    attack()


def test_whatever_stands_in_a_file_its_readers_end_as_they_promise(tmp_path):
    fuzz(tmp_path, examples=60, always_the_same=True)


@pytest.mark.long
def test_a_minute_of_damaged_files_finds_nothing_else(tmp_path):
    """60 s. A longer one: MIXTRAIN_FUZZ_SECONDS=3600."""
    end = time.monotonic() + float(os.environ.get("MIXTRAIN_FUZZ_SECONDS", 60))
    rounds = 0
    while time.monotonic() < end:
        fuzz(tmp_path, examples=250, always_the_same=False)
        rounds += 1
    print(f"{rounds * 250:,} files")
    assert rounds
