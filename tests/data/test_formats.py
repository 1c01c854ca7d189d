"""The format of a directory, by its files: none is misread, and none is left out silently."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from mixtrain.data.sources import open_source
from mixtrain.errors import UserError

CARD = """---
configs:
- config_name: en
  data_files: en/*
- config_name: de
  data_files: de/*
---
# Card
"""
TABLE = "---\nsize_categories:\n- n<1K\n---\n# Card\n"

# (files; some have a dataset card in README.md, files read in order or "!" and the refusal)
ARRANGEMENTS = [
    # text
    ("a.txt b.md c/d.py", "a.txt b.md c/d.py"),
    ("a.txt README.md LICENSE", "LICENSE README.md a.txt"),
    ("a.txt .gitattributes .git/config", "a.txt"),
    ("a.txt.gz b.txt", "a.txt.gz b.txt"),
    ("README.md", "!the only file is README.md, which is not read as data"),
    ("README.md LICENSE", "!the only file is LICENSE, which is not read as data"),
    # JSON lines
    ("a.jsonl b.ndjson", "a.jsonl b.ndjson"),
    ("b/c/d.jsonl b/a.jsonl a.jsonl", "a.jsonl b/a.jsonl b/c/d.jsonl"),
    ("a.jsonl README.md LICENSE .gitattributes", "a.jsonl"),
    ("a.jsonl.gz b.jsonl README.md", "a.jsonl.gz b.jsonl"),
    ("train.jsonl test.jsonl", "train.jsonl"),
    ("a.jsonl b.txt", "!a.jsonl is not text, and b.txt beside it may be"),
    ("a.jsonl notes.md README.md", "!a.jsonl is not text, and notes.md beside it may be"),
    ("a.jsonl b.csv", "!b.csv would be left out"),
    ("a.jsonl photo.png", "!photo.png: the suffix names no format"),
    # tables
    ("20231101.en/train-0.parquet README.md", "20231101.en/train-0.parquet"),
    ("20231101.en/0.parquet 20231101.de/0.parquet", "20231101.de/0.parquet 20231101.en/0.parquet"),
    ("sample/10BT/0.parquet sample/10BT/1.parquet", "sample/10BT/0.parquet sample/10BT/1.parquet"),
    ("a/b/c/1.parquet README.md LICENSE .gitattributes", "a/b/c/1.parquet"),
    ("10.parquet 9.parquet", "10.parquet 9.parquet"),
    ("train/0.parquet test/0.parquet", "train/0.parquet"),
    ("a.parquet b.txt", "!b.txt would be left out"),
    ("a.parquet photo.png", "!photo.png would be left out"),
    ("a.csv", "a.csv"),
    ("a.tsv b.tsv", "a.tsv b.tsv"),
    ("a.json README.md", "a.json"),
    # a clone of a Hub dataset, with its card
    ("en/0.jsonl de/0.jsonl README.md:card", "!['en', 'de']"),
    ("en/0.parquet de/0.parquet README.md:card", "!['en', 'de']"),
    ("data/x/0.parquet README.md:table", "data/x/0.parquet"),
    ("a.txt README.md:table", "!README.md describes a data set"),
    # neither text nor known
    ("a.py package.json", "!package.json is not text, and a.py beside it may be"),
    ("a.py Makefile README.md", "!Makefile: the suffix names no format"),
    ("a.c a.h", "!a.c and 1 more: the suffix names no format"),
    ("AA/wiki_00 AA/wiki_01 AB/wiki_00", "!AA/wiki_00 and 2 more: the suffix names no format"),
    ("a.txt photo.png", "!photo.png: the suffix names no format"),
    ("a.txt b.zip", "!b.zip: the suffix names no format"),
    ("a.parquet.gz", "!a.parquet.gz: the suffix names no format"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def lay_out(root: Path, files: str) -> Path:
    """Write files that contain their own names."""
    import gzip

    for word in files.split():
        name, _, card = word.partition(":")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"card": CARD, "table": TABLE}.get(card, name).encode()
        if ".json" in name or ".ndjson" in name:
            content = json.dumps({"text": name}).encode() + b"\n"
        elif name.endswith((".csv", ".tsv")):
            content = f"text\n{name}\n".encode()
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), path)
        else:
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return root


def read(root, *arguments, **given) -> list[str]:
    return [item.text() for item in open_source(str(root), *arguments, **given).documents()]


def refusal(root, *arguments, **given) -> str:
    with pytest.raises(UserError) as refused:
        read(root, *arguments, **given)
    (problem,) = refused.value.problems
    assert "\n" not in problem
    return problem


@pytest.mark.parametrize("files, outcome", ARRANGEMENTS, ids=[files for files, _ in ARRANGEMENTS])
def test_a_directory_is_read_as_its_suffixes_say_or_refused(files, outcome, tmp_path):
    root = lay_out(tmp_path / "d", files)
    if outcome.startswith("!"):
        assert outcome[1:] in refusal(root)
    else:
        assert read(root) == outcome.split()


@pytest.mark.parametrize(
    "files, given, outcome",
    [
        ("a.txt photo.png", {"exclude": ("*.png",)}, "a.txt"),
        ("a.txt x/photo.png", {"exclude": ("x/*",)}, "a.txt"),
        ("a.py package.json b/c.py", {"exclude": ("package.json", "b/*")}, "a.py"),
        ("a.py package.json", {"suffixes": (".py",)}, "a.py"),
        ("a.c Makefile", {"suffixes": (".c",)}, "a.c"),
        ("a.jsonl b.txt", {"suffixes": (".jsonl",)}, "a.jsonl"),
        ("a.jsonl b.txt", {"suffixes": (".txt", ".jsonl")}, "a.jsonl b.txt"),
        ("a.parquet x/b.parquet c.txt", {"suffixes": (".parquet",)}, "a.parquet x/b.parquet"),
        ("a.parquet b.txt", {"exclude": ("*.txt",)}, "a.parquet"),
        ("a.jsonl README.md b.jsonl", {"exclude": ("b*",)}, "a.jsonl"),
        ("AA/wiki_00 AB/wiki_00", {"input_format": "directory"}, "AA/wiki_00 AB/wiki_00"),
        ("a.jsonl b.jsonl README.md", {"input_format": "jsonl"}, "a.jsonl b.jsonl"),
        ("train.jsonl test.jsonl", {"input_format": "jsonl"}, "test.jsonl train.jsonl"),
        ("a.parquet b.txt", {"suffixes": (".parquet", ".txt")}, "!are not of one format"),
        ("a.parquet b.parquet", {"exclude": ("b*",)}, "!--exclude would leave out b.parquet"),
        ("a.jsonl b.txt", {"input_format": "jsonl"}, "!b.txt is not jsonl by its suffix"),
        ("a.txt", {"exclude": ("*.png",)}, "!no file there matches --exclude *.png"),
        ("a.txt", {"exclude": ("*",)}, "!--exclude * leaves no file"),
    ],
)
def test_what_is_read_of_a_mixture_can_be_said(files, given, outcome, tmp_path):
    root = lay_out(tmp_path / "d", files)
    if outcome.startswith("!"):
        assert outcome[1:] in refusal(root, **given)
    else:
        assert read(root, **given) == outcome.split()


def test_json_lines_without_a_suffix_are_read_when_that_is_said(tmp_path):
    for name in ("AA/wiki_00", "AB/wiki_00"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert read(tmp_path, "jsonl") == ["AA/wiki_00", "AB/wiki_00"]
    assert [item.name for item in open_source(str(tmp_path), "jsonl").documents()] == [
        "AA/wiki_00 line 1",
        "AB/wiki_00 line 1",
    ]


def test_json_lines_of_a_directory_are_read_under_the_key_that_is_given(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{bad\n{"body": "two"}\n')
    items = list(open_source(str(tmp_path), json_key="body").documents())
    # the rest is still read
    assert [item.text() for item in items if item.name != "a.jsonl line 2"] == ["one", "two"]


@pytest.mark.parametrize(
    "name, given, said",
    [
        (
            "a.jsonl",
            {"column": "text"},
            "--column is for the rows of a data set; type --json-key text",
        ),
        ("a.txt", {"column": "text"}, "--column is for the rows of a data set"),
        ("a.csv", {"json_key": "text"}, "--json-key is for .jsonl files; type --column text"),
        ("a.txt", {"json_key": "text"}, "--json-key is for .jsonl files; leave it out"),
        (
            "a.txt",
            {"exclude": ("*.png",)},
            "--exclude chooses among the files of a directory; leave it out",
        ),
    ],
)
def test_an_option_that_would_change_nothing_is_refused_also_with_the_value_it_has_by_itself(
    name, given, said, tmp_path
):
    lay_out(tmp_path, name)
    assert said in refusal(tmp_path / name, **given)
