"""Unreadable documents: a few are left out and named, many are an error."""

import json

import pytest
from preprocessing import command

from mixtrain.data.json_lines import JsonLines
from mixtrain.data.preprocess import preprocess
from mixtrain.errors import UserError


def lines(path, good: int, bad: int) -> JsonLines:
    """Write a file of documents under the key `text`, followed by lines with other keys."""
    found = [{"text": f"words {number}"} for number in range(good)] + [
        {"body": "x", "id": n} for n in range(bad)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    return JsonLines(path, "text")


@pytest.mark.parametrize(
    "good, bad, given, passes",
    [
        (2, 2, None, False),
        (1, 1, None, False),
        (1, 2, None, False),
        (5, 3, None, False),
        (50, 50, None, False),
        (3, 2, None, True),
        (2, 1, None, True),
        (97, 3, None, False),
        (98, 2, None, True),
        (297, 3, None, True),
        (296, 4, None, False),
        (2, 2, 0.5, True),
        (1, 3, 0.5, False),
        (99, 1, 0, False),
        (99, 1, 0.01, True),
        (1, 9, 1, True),
        (100, 0, 0, True),
    ],
)
def test_more_unreadable_documents_than_may_be_are_an_error_and_nothing_is_written(
    good, bad, given, passes, tokenizer, tmp_path
):
    source = lines(tmp_path / "a.jsonl", good, bad)
    if passes:
        facts = preprocess(
            source, tmp_path / "x", tokenizer, max_unreadable=given, log=lambda line: None
        )
        assert (facts["documents"], facts["unreadable"]) == (good, bad)
    else:
        with pytest.raises(
            UserError, match=rf"^{bad} of {good + bad} documents cannot be read, and \d+ may be"
        ):
            preprocess(
                source, tmp_path / "x", tokenizer, max_unreadable=given, log=lambda line: None
            )
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_share_that_the_error_names_is_enough(tokenizer, tmp_path):
    source = lines(tmp_path / "a.jsonl", 7, 5)
    with pytest.raises(UserError) as refused:
        preprocess(source, tmp_path / "x", tokenizer, log=lambda line: None)
    (problem,) = refused.value.problems
    assert "the first is a.jsonl line 8: no key 'text'; there is body, id;" in problem
    share = problem.partition("type --max-unreadable ")[2]
    preprocess(
        source, tmp_path / "x", tokenizer, max_unreadable=float(share), log=lambda line: None
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_the_keys_that_there_are_are_said_once(workers, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("mixtrain.data.json_lines.BLOCK", 64)
    source = lines(tmp_path / "a.jsonl", 20, 20)
    said = []
    preprocess(
        source, tmp_path / "x", tokenizer, max_unreadable=1, workers=workers, log=said.append
    )
    assert said == [
        "preprocess: a.jsonl line 21: no key 'text'; there is body, id"
        " (every other item with no key 'text' is counted, not named)"
    ]


def test_of_many_keys_the_first_are_named_and_a_line_without_an_object_has_none(
    tokenizer, tmp_path
):
    many = {f"key{number}": number for number in range(100)}
    (tmp_path / "a.jsonl").write_text(json.dumps(many) + '\n"text"\n["text"]\n{}\n{"text": "x"}\n')
    found = []
    for item in JsonLines(tmp_path / "a.jsonl", "text").documents():
        try:
            item.text()
        except Exception as error:
            found.append(str(error))
    assert found == [
        "no key 'text'; there is key0, key1, key2, key3, key4, key5, key6, key7, ...",
        "no key 'text': the line holds no object",
        "no key 'text': the line holds no object",
        "no key 'text'; there is none",
    ]


def test_what_a_file_names_its_keys_does_not_reach_the_terminal_as_it_is(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"\x1b[2Jgone": "x"}) + '\n{"text": "x"}\n')
    done = command(
        "a.jsonl", "--output", "x", "--tokenizer", str(tokenizer), "--workers", "1", cwd=tmp_path
    )
    assert done.returncode == 2 and "\x1b" not in done.stderr and r"\x1b[2Jgone" in done.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["a.jsonl", "--column", "text"],
            "--column is for the rows of a data set; type --json-key text",
        ),
        (["a.txt", "--json-key", "text"], "--json-key is for .jsonl files; leave it out"),
        (["a.jsonl", "--max-unreadable", "50"], "50 is not a number from 0 to 1, such as 0.05"),
        (["a.jsonl", "--max-unreadable", "nan"], "nan is not a number from 0 to 1"),
        (
            ["a.jsonl"],
            "2 of 4 documents cannot be read, and 1 may be left out; the first is a.jsonl"
            " line 3: no key 'text'",
        ),
        (["a.jsonl", "--max-unreadable", "0.5"], ""),
    ],
)
def test_the_command_says_so_in_one_line_with_exit_code_2(words, said, tokenizer, tmp_path):
    lines(tmp_path / "a.jsonl", 2, 2)
    (tmp_path / "a.txt").write_text("text")
    done = command(
        *words, "--output", "x", "--tokenizer", str(tokenizer), "--workers", "1", cwd=tmp_path
    )
    assert (
        done.returncode == (2 if said else 0)
        and said in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (tmp_path / "x.idx").exists() is not bool(said)
