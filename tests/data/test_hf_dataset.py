"""Rows of datasets on disk: which rows a split selects, and that no file is left out silently."""

import json
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from mixtrain.data.directory import is_not_data
from mixtrain.data.sources import Rows, open_source
from mixtrain.errors import UserError

CARD = """---
configs:
- config_name: {}
  data_files:
  - split: train
    path: {}
---
# The card of a data set
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def write(root: Path, *files: str, rows: int = 3) -> Path:
    """Write files of `rows` rows each: `STEM 0`, `STEM 1`, ..."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{path.stem} {number}" for number in range(rows)]
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
        else:
            csv = path.suffix == ".csv"
            lines = ["text", *texts] if csv else [json.dumps({"text": text}) for text in texts]
            path.write_text("".join(f"{line}\n" for line in lines))
    return root


def texts(name, *arguments, **given) -> list[str]:
    return [item.text() for item in open_source(str(name), *arguments, **given).documents()]


def refusal(name, *arguments, **given) -> str:
    with pytest.raises(UserError) as refused:
        texts(name, *arguments, **given)
    (problem,) = refused.value.problems
    assert "\n" not in problem
    return problem


def saved(root: Path, rows: int) -> Path:
    """The output of save_to_disk for the splits train and test."""
    texts = {part: [f"{part} {number}" for number in range(rows)] for part in ("train", "test")}
    made = datasets.DatasetDict(
        {part: datasets.Dataset.from_dict({"text": texts[part]}) for part in texts}
    )
    made.save_to_disk(str(root / "saved"))
    return root / "saved"


# Slices


SPECS = [
    "train[:10%]",
    "train[10%:]",
    "train[:33%]",
    "train[-20%:]",
    "train[3:8]",
    "train[:-4]",
    "train[25:999]",
    "train[:5]+train[20:]",
    "train + train[1:2]",
    "train",
]


@pytest.mark.parametrize(
    "shape", ["parquet", "json", "csv", "directory", "saved", "saved alone", "pattern"]
)
def test_a_slice_is_the_one_that_datasets_takes_whatever_the_rows_lie_in(shape, tmp_path):
    if shape.startswith("saved"):
        root = saved(tmp_path, 27)
        root = root / "train" if shape == "saved alone" else root
    elif shape == "directory":
        write(
            write(tmp_path / "d", "train/0.parquet", rows=20),
            "train/1.parquet",
            "test/0.parquet",
            rows=7,
        )
        root = tmp_path / "d"
    elif shape == "pattern":
        root = (
            f"{write(write(tmp_path / 'd', 'a.parquet', rows=20), 'b.parquet', rows=7)}/*.parquet"
        )
    else:
        root = tmp_path / f"d.{shape}"
        write(tmp_path, f"d.{shape}", rows=27)
    whole = texts(root)
    assert len(whole) == 27
    names = datasets.Dataset.from_dict({"text": whole})
    for spec in SPECS:
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute({"train": 27})
        wanted = [text for part in parts for text in names[part.from_ : part.to]["text"]]
        assert texts(root, split=spec) == wanted, spec


def test_the_two_sides_of_a_percentage_share_no_row_and_leave_none_out(tmp_path):
    path = write(tmp_path, "d.parquet", rows=27) / "d.parquet"
    for percent in (10, 33, 50):
        first, second = (
            texts(path, split=f"train[{cut}]") for cut in (f":{percent}%", f"{percent}%:")
        )
        assert first and second and first + second == texts(path)


def test_a_slice_may_join_splits_and_knows_its_length(tmp_path):
    write(tmp_path / "d", "train.parquet", "test.parquet", rows=10)
    source = open_source(str(tmp_path / "d"), split="train[:20%]+test[1:3]")
    texts = [document.text() for document in source.documents()]
    assert texts == ["train 0", "train 1", "test 1", "test 2"]
    assert isinstance(source, Rows) and source.total() == 4


@pytest.mark.parametrize(
    "split, said",
    [
        (
            "validation",
            "no split 'validation'; there is train, test, or a part of one: train[:10%]",
        ),
        ("train+dev[:3]", "no split 'dev[:3]'; there is train, test"),
        ("", "no split ''; there is train, test"),
        ("train[", "--split train[ cannot be read (Unrecognized instruction format: train["),
        ("train[:ten]", "--split train[:ten] cannot be read"),
        ("train[::2]", "--split train[::2] cannot be read"),
        ("train[:200%]", "--split train[:200%] cannot be read"),
        ("train[:1%]", "--split train[:1%] selects no row of the 10 in it"),
        ("train[10:]", "--split train[10:] selects no row of the 10 in it"),
        ("test+train[5:5]", "--split train[5:5] selects no row of the 10 in it"),
        ("train[:10%](pct1_dropremainder)", "cannot be read"),
    ],
)
@pytest.mark.parametrize("shape", ["directory", "saved"])
def test_a_split_that_is_not_there_or_takes_nothing_is_refused(split, said, shape, tmp_path):
    root = (
        saved(tmp_path, 10)
        if shape == "saved"
        else write(tmp_path / "d", "train.parquet", "test.parquet", rows=10)
    )
    problem = refusal(root, split=split)
    assert problem.startswith(f"{root}: ") and said in problem


def test_a_single_file_has_no_split_but_train_and_no_subset(tmp_path):
    write(tmp_path, "d.parquet")
    assert refusal(tmp_path / "d.parquet", subset="en").endswith(
        "no subsets in it; leave --subset en out"
    )
    assert "no split 'test'; there is train," in refusal(tmp_path / "d.parquet", split="test")


def test_a_split_that_was_saved_alone_has_its_own_name(tmp_path):
    datasets.Dataset.from_dict({"text": ["one"]}, split="test").save_to_disk(str(tmp_path / "d"))
    assert texts(tmp_path / "d") == texts(tmp_path / "d", split="test") == ["one"]
    assert "no split 'train'; there is test," in refusal(tmp_path / "d", split="train")


# Options that the format does not read


@pytest.mark.parametrize(
    "name, given, said",
    [
        (
            "a.jsonl",
            {"split": "train[:10%]"},
            "and --split is for the rows of a data set; type --input-format datasets",
        ),
        ("a.jsonl", {"column": "body"}, "--column is for the rows of a data set"),
        ("a.txt", {"split": "train"}, "a.txt is read as text, and --split is for the rows"),
        ("", {"split": "test"}, " is read as directory, and --split is for the rows"),
        (
            "a.csv",
            {"json_key": "body"},
            "datasets, and --json-key is for .jsonl files; type --column body",
        ),
        (
            "a.txt",
            {"json_key": "body"},
            "a.txt is read as text, and --json-key is for .jsonl files; leave it out",
        ),
        ("a.txt", {"subset": "en"}, "--subset is for the rows of a data set"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(name, given, said, tmp_path):
    for file in ("a.jsonl", "a.txt", "a.csv"):
        (tmp_path / file).write_text("")
    source = [str(tmp_path / name)] if name else [str(tmp_path), "directory"]
    assert said in refusal(*source, **given)


def test_a_jsonl_file_can_be_sliced_as_a_data_set(tmp_path):
    write(tmp_path, "d.jsonl", rows=10)
    assert texts(tmp_path / "d.jsonl", "datasets", split="train[:20%]") == ["d 0", "d 1"]


# Clones of Hub repositories


LAYOUTS = {
    "data": (["data/train.parquet"], "data/*"),
    "shards": (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "train-*"),
    "a folder": (["plain_text/train-00000-of-00001.parquet"], "plain_text/train-*"),
    "one deeper": (["default/train/0000.parquet"], "default/train/*.parquet"),
    "jsonl": (["data/train.jsonl"], "data/train.jsonl"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("card", [True, False])
def test_a_clone_of_a_data_set_is_read_as_one_and_its_readme_is_no_document(layout, card, tmp_path):
    files, pattern = LAYOUTS[layout]
    root = write(tmp_path / "clone", *files)
    (root / "README.md").write_text(CARD.format("default", pattern) if card else "# A data set\n")
    (root / "LICENSE").write_text("all rights")
    (root / ".gitattributes").write_text("*.parquet filter=lfs")
    (root / "dataset_infos.json").write_text("{}")
    write(root / ".git", "x.parquet")
    found = texts(root)
    assert found == [f"{Path(file).stem} {number}" for file in files for number in range(3)]
    assert texts(root, split="train[1:2]") == found[1:2]


def test_a_clone_with_several_subsets_asks_for_one(tmp_path):
    root = write(tmp_path / "clone", "en/0.jsonl", "de/0.jsonl")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("en", "de"))
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    problem = refusal(root)
    assert "Config name is missing" in problem and "['en', 'de']" in problem
    assert len(texts(root, subset="de")) == 3
    write(root, "fr/0.jsonl")
    assert refusal(root, subset="de").startswith(f"{root}: fr/0.jsonl would be left out")


@pytest.mark.parametrize("named", ["extra.parquet", "notes/a.csv", "data/b.jsonl"])
def test_a_file_that_a_data_set_would_leave_out_is_named_and_a_pattern_says_what_to_read(
    named, tmp_path
):
    root = write(tmp_path / "clone", "data/train.parquet", named)
    (root / "README.md").write_text(CARD.format("default", "data/*.parquet"))
    problem = refusal(root)
    assert (
        problem.startswith(f"{root}: {named} would be left out")
        and f"'{root}/**/*.parquet'" in problem
    )
    assert texts(f"{root}/data/*.parquet") == ["train 0", "train 1", "train 2"]


@pytest.mark.parametrize(
    "name, not_data",
    [
        ("README.md", True),
        ("readme_de.txt", True),
        ("LICENSE", True),
        ("licence-code.md", True),
        ("CITATION.cff", True),
        ("x/dataset_infos.json", True),
        ("license.parquet", False),
        ("readme.csv", False),
        ("state.json", False),
        ("notes.md", False),
        ("dataset_infos.csv", False),
    ],
)
def test_a_file_that_is_not_data_is_known_by_its_whole_name(name, not_data):
    assert is_not_data(name) is not_data


def test_records_beside_text_are_refused_until_it_is_said_what_to_read(tmp_path):
    write(tmp_path / "d", "b.jsonl", "c.jsonl", rows=1)
    (tmp_path / "d" / "a.txt").write_text("text")
    problem = refusal(tmp_path / "d")
    assert problem.startswith(
        f"{tmp_path}/d/b.jsonl is not text, and a.txt beside it may be; say what to read: --suffix"
    )
    assert texts(tmp_path / "d", suffixes=(".txt",)) == ["text"]
    assert texts(f"{tmp_path}/d/*.jsonl") == ["b 0", "c 0"]
    assert len(texts(tmp_path / "d", "directory")) == 3
    assert texts(tmp_path / "d", suffixes=(".jsonl",)) == ["b 0", "c 0"]
    assert texts(tmp_path / "d", suffixes=(".jsonl", ".txt")) == ["text", "b 0", "c 0"]


def test_a_directory_of_records_alone_is_a_data_set(tmp_path):
    write(tmp_path / "d", "a.jsonl", "b.jsonl", rows=1)
    assert texts(tmp_path / "d") == ["a 0", "b 0"]


@pytest.mark.parametrize("name", ["a.html", "all.zip", "a.parquet"])
def test_a_file_that_is_no_text_is_not_passed_over_beside_text(name, tmp_path):
    (tmp_path / "b.txt").write_text("text")
    if name.endswith("parquet"):
        write(tmp_path, "a.parquet")
        assert refusal(tmp_path).startswith(f"{tmp_path}: b.txt would be left out")
    else:
        (tmp_path / name).write_bytes(b"\x1f\x8b")
        assert refusal(tmp_path).startswith(
            f"{tmp_path}/{name}: the suffix names no format; say what to read"
        )


def test_the_card_of_a_data_set_without_its_files_is_not_the_corpus(tmp_path):
    (tmp_path / "README.md").write_text(CARD.format("default", "data/*"))
    assert "README.md describes a data set" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert "README.md describes a data set" in refusal(tmp_path)
    assert texts(tmp_path, suffixes=(".txt",)) == ["text"]
    (tmp_path / "README.md").write_text("# Notes")
    assert texts(tmp_path) == ["# Notes", "text"]


def test_a_git_lfs_pointer_is_not_read_in_the_place_of_its_file(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_text(pointer)
    assert (
        "data/train.parquet: a Git LFS pointer, its content was not fetched; type git lfs pull"
        in refusal(tmp_path)
    )
    (tmp_path / "a.txt").write_text(pointer)
    (item,) = open_source(str(tmp_path / "a.txt")).documents()
    with pytest.raises(Exception, match="a Git LFS pointer, its content was not fetched"):
        item.text()


def test_a_file_that_is_broken_behind_good_ones_is_a_users_error_with_its_row(tmp_path):
    root = write(tmp_path / "d", "train-0.parquet")
    (root / "train-1.parquet").write_bytes(b"PAR1, and then nothing of the kind")
    assert refusal(root).startswith(f"{root}: `datasets` cannot read row 3: ")


def test_a_pattern_takes_files_of_one_format_and_some(tmp_path):
    write(tmp_path, "a.jsonl", "b.csv")
    assert "no file matches this pattern" in refusal(f"{tmp_path}/*.parquet")
    assert "are not of one format; give a narrower pattern" in refusal(f"{tmp_path}/*")
    write(tmp_path / "tables", "a.parquet", "b.csv")
    assert "are not of one format; give a narrower pattern" in refusal(f"{tmp_path}/tables/*")
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "d.txt").write_text("more")
    assert texts(f"{tmp_path}/*.txt") == ["text", "more"]
