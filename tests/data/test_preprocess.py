import hashlib
import json
import os
import signal
from pathlib import Path

import numpy
import pytest
from mistral_files import as_published
from preprocessing import command, wait_for
from transformers import PreTrainedTokenizerFast

from mixtrain.data.preprocess import preprocess
from mixtrain.data.sources import Files, JsonLines
from mixtrain.data.tokenizer import load_tokenizer
from mixtrain.errors import UserError
from mixtrain.interop.generate.tokenization import PromptTokenizer

LINES = 256


def quiet(line: str) -> None:
    pass


def read_back(prefix) -> list[numpy.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    return [data[i].copy() for i in range(len(data))]  # the file is unmapped with `data`


@pytest.fixture
def lines(tmp_path, library) -> JsonLines:
    """More documents than one block, some of them empty or unreadable."""
    words = (library / "heapq.py").read_text().split()
    path = tmp_path / "lines.jsonl"
    with open(path, "w") as stream:
        for i in range(5 * LINES):
            stream.write(json.dumps({"text": " ".join(words[i : i + 40])}) + "\n")
            if i % 100 == 0:
                stream.write("{bad\n" if i % 200 else '{"text": " "}\n')
    return JsonLines(path, "text")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return as_published(tmp_path_factory.mktemp("published") / "tokenizer")


def test_every_document_is_its_tokens_and_the_end_of_document_token(source, indexed, tokenizer):
    encode = load_tokenizer(tokenizer).encode
    wanted = [
        encode(item.text(), add_special_tokens=False).ids + [0] for item in source.documents()
    ]
    assert [document.tolist() for document in read_back(indexed)] == wanted


def test_a_document_begins_with_its_text_whatever_the_tokenizer_puts_first(tokenizer, tmp_path):
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    both = {"single": [first, text], "pair": [first, text]}
    content["post_processor"] = {"type": "TemplateProcessing", "special_tokens": tokens, **both}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes(
        (tokenizer / "tokenizer_config.json").read_bytes()
    )
    (tmp_path / "a.txt").write_text("abc")
    preprocess(Files(tmp_path, ["a.txt"]), tmp_path / "x", tmp_path, log=quiet)
    assert load_tokenizer(tmp_path).encode("abc").ids[0] == 0
    assert read_back(tmp_path / "x")[0].tolist() == load_tokenizer(tokenizer).encode("abc").ids + [
        0
    ]


def test_the_description_says_what_is_in_the_files(indexed, tokenizer):
    facts = json.loads(Path(f"{indexed}.json").read_text())
    tokens = numpy.concatenate(read_back(indexed))
    assert facts["documents"] == 16 and facts["tokens"] == len(tokens)
    assert (facts["vocab_size"], facts["eod_id"], facts["dtype"], tokens.dtype) == (
        512,
        0,
        "uint16",
        numpy.uint16,
    )
    assert facts["max_token_id"] == tokens.max()
    assert facts["bin_sha256"] == hashlib.sha256(Path(f"{indexed}.bin").read_bytes()).hexdigest()
    assert (
        facts["tokenizer_sha256"]
        == hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    )
    assert (Path(indexed).parent / facts["tokenizer"]).resolve() == tokenizer


def test_one_worker_and_three_write_the_same_bytes(lines, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("mixtrain.data.json_lines.BLOCK", 4096)  # more blocks than may be pending
    for workers in (1, 3):
        preprocess(lines, tmp_path / str(workers) / "x", tokenizer, workers=workers, log=quiet)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"1/x{suffix}").read_bytes() == (tmp_path / f"3/x{suffix}").read_bytes()
    assert len(read_back(tmp_path / "3/x")) == 5 * LINES


def test_lost_documents_are_counted_and_the_first_ten_named(lines, tokenizer, tmp_path):
    said = []
    facts = preprocess(lines, tmp_path / "x", tokenizer, log=said.append)
    assert (facts["documents"], facts["empty"], facts["unreadable"]) == (5 * LINES, 7, 6)
    assert len(said) == 11 and said[-1].endswith("they are counted, not named")
    assert "preprocess: lines.jsonl line 2: empty" in said
    assert any(line.startswith("preprocess: lines.jsonl line 103: not valid JSON") for line in said)


def test_a_source_of_which_no_document_survives_is_refused_and_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"body": "x"}\n')
    with pytest.raises(UserError, match="no document survived: 1 of them empty, 1 unreadable"):
        preprocess(JsonLines(tmp_path / "a.jsonl", "text"), tmp_path / "x", tokenizer, log=quiet)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_existing_output_is_kept_unless_it_may_be_replaced(source, tokenizer, tmp_path):
    small = Files(source.root, source.names[:2])
    preprocess(source, tmp_path / "x", train_vocab_size=300, log=quiet)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(before) == {"x.bin", "x.idx", "x.json", "x-tokenizer"}
    with pytest.raises(UserError, match="x.bin exists already; .* --overwrite"):
        preprocess(small, tmp_path / "x", tokenizer, log=quiet)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    facts = preprocess(small, tmp_path / "x", train_vocab_size=301, overwrite=True, log=quiet)
    assert (
        facts["documents"] == 2
        and facts["vocab_size"] == 301
        and len(read_back(tmp_path / "x")) == 2
    )
    assert set(os.listdir(tmp_path)) == set(before)


def test_a_directory_that_is_no_tokenizer_is_never_replaced(source, tmp_path):
    (tmp_path / "x-tokenizer").mkdir()
    (tmp_path / "x-tokenizer" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(UserError, match="x-tokenizer is not a tokenizer directory"):
        preprocess(source, tmp_path / "x", train_vocab_size=300, overwrite=True, log=quiet)
    assert (tmp_path / "x-tokenizer" / "thesis.txt").read_text() == "irreplaceable"


def test_a_killed_run_leaves_no_file_under_a_final_name(tokenizer, tmp_path):
    # a pipe, which the test keeps open
    os.mkfifo(tmp_path / "endless.jsonl")
    child = os.fork()
    if not child:
        preprocess(
            JsonLines(tmp_path / "endless.jsonl", "text"), tmp_path / "x", tokenizer, log=quiet
        )
        os._exit(0)
    with open(tmp_path / "endless.jsonl", "w") as stream:
        for _ in range(3 * LINES):
            stream.write(json.dumps({"text": "words " * 50}) + "\n")
        stream.flush()
        wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("x.writing/data.bin")))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not list(tmp_path.glob("x.[!w]*"))


def test_a_vocabulary_above_65500_is_written_in_four_bytes_a_token(tmp_path):
    vocab = {chr(i): i for i in range(32, 127)} | {"<eos>": 70_000}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocab)}, "merges": []}
    added = [
        {
            "id": 70_000,
            "content": "<eos>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ]
    del model["vocab"]["<eos>"]
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": model, "added_tokens": added})
    )
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (tmp_path / "a.txt").write_text("abc")
    facts = preprocess(Files(tmp_path, ["a.txt"]), tmp_path / "x", tmp_path, log=quiet)
    assert facts["dtype"] == "int32" and facts["max_token_id"] == 70_000
    assert read_back(tmp_path / "x")[0].tolist() == [65, 66, 67, 70_000]


def test_progress_is_said_in_lines_where_there_is_no_terminal(
    lines, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("mixtrain.data.progress.SECONDS_BETWEEN_LINES", 0)
    said = []
    preprocess(lines, tmp_path / "x", tokenizer, log=said.append)
    size = lines.path.stat().st_size
    progress = [line for line in said if line.startswith("preprocess: tokenizing")]
    assert progress[-1].startswith(
        f"preprocess: tokenizing, {size:,} of {size:,} bytes: 1,280 documents, "
    )


CHATS = ["<s>[INST] a [/INST] b</s>", "plain", "a </s> b</s> </s>"]


@pytest.mark.parametrize("workers", [1, 2])
def test_texts_that_spell_a_special_token_are_counted_and_the_first_is_named(
    published, workers, tmp_path
):
    path = tmp_path / "chats.jsonl"
    said = []
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in CHATS))
    facts = preprocess(
        JsonLines(path, "text"), tmp_path / "x", published, workers=workers, log=said.append
    )
    assert (
        "preprocess: 2 texts spell a special token (first: `<s>` in chats.jsonl line 1), which"
        " stayed text; --parse-special-tokens makes it the token"
    ) in said
    assert facts["spell_special_tokens"] == 2 and facts["parse_special_tokens"] is False
    assert all(2 not in document[:-1] for document in read_back(tmp_path / "x"))


def test_special_tokens_are_parsed_where_that_is_asked_for_as_generation_and_transformers_do(
    published, tmp_path
):
    path = tmp_path / "chats.jsonl"
    said = []
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in CHATS))
    prefix = tmp_path / "x"
    facts = preprocess(
        JsonLines(path, "text"), prefix, published, parse_special_tokens=True, log=said.append
    )
    assert (
        "preprocess: 2 texts spell a special token (first: `<s>` in chats.jsonl line 1), which"
        " became that token"
    ) in said
    assert json.loads((tmp_path / "x.json").read_text()) == facts
    assert facts["spell_special_tokens"] == 2 and facts["parse_special_tokens"] is True
    there = PreTrainedTokenizerFast(tokenizer_file=str(published / "tokenizer.json"))
    text = PromptTokenizer(str(published), [])
    for said, document in zip(CHATS, read_back(prefix), strict=True):
        assert document.tolist() == [*there(said, add_special_tokens=False)["input_ids"], 2]
        assert [1, *document[:-1]] == text.encode(said, chat=False)


def test_of_texts_that_spell_none_nothing_is_said(lines, tokenizer, tmp_path):
    said = []
    assert (
        preprocess(lines, tmp_path / "x", tokenizer, log=said.append)["spell_special_tokens"] == 0
    )
    assert not [line for line in said if "special token" in line]


def test_no_worker_or_two_tokenizers_are_refused(source, tokenizer, tmp_path):
    with pytest.raises(UserError, match="--workers = 0 is less than one process"):
        preprocess(source, tmp_path / "x", tokenizer, workers=0)
    with pytest.raises(UserError, match="either a tokenizer directory or"):
        preprocess(source, tmp_path / "x", tokenizer, train_vocab_size=300)


def test_the_command_writes_a_data_set_and_says_so(source, tmp_path):
    for name in source.names[:4]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes((source.root / name).read_bytes())
    (tmp_path / "in/empty.py").write_text("")
    (tmp_path / "in/note.md").write_text("left out by --suffix")
    arguments = "in --output out/x --train-tokenizer 320 --suffix .py --workers 2"
    done = command(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("out/x: 4 documents, ")
        and "1 empty and 0 unreadable left out" in done.stdout
    )
    assert "preprocess: empty.py: empty" in done.stderr
    assert len(read_back(tmp_path / "out/x")) == 4


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (
            ["gone.jsonl", "--output", "x", "--train-tokenizer", "300"],
            "gone.jsonl: no such file or directory",
        ),
        (
            ["nobody/nothing", "--output", "x", "--train-tokenizer", "300"],
            "nobody/nothing: no such path, and",
        ),
        (["a.txt", "--output", "x", "--tokenizer", "."], "no tokenizer.json there"),
        (
            ["a.txt", "--output", "x", "--train-tokenizer", "400"],
            "vocabulary of 400 tokens: it holds only",
        ),
        (
            ["a.txt", "--output", "a.txt/x", "--train-tokenizer", "400"],
            "x.writing cannot be made (Not a directory)",
        ),
        (
            ["a.txt", "--output", "x"],
            "one of the arguments --tokenizer --train-tokenizer is required",
        ),
    ],
)
def test_the_command_refuses_a_users_mistake_with_exit_code_2_and_no_traceback(
    tmp_path, arguments, problem
):
    (tmp_path / "a.txt").write_text("some text, but little")
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_command_explains_itself(tmp_path):
    done = command("--help", cwd=tmp_path)
    assert (
        done.returncode == 0
        and "--train-tokenizer VOCAB_SIZE" in done.stdout
        and "Exit codes" in done.stdout
    )
