import json

import pytest

from mixtrain.data.documents import UnreadableDocument
from mixtrain.data.sources import open_source
from mixtrain.errors import UserError


def texts(source) -> dict[str, str]:
    """Return {name: text} of every document, or why it has none."""
    found = {}
    for item in source.documents():
        try:
            found[item.name] = item.text()
        except UnreadableDocument as error:
            found[item.name] = f"unreadable: {error}"
    return found


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\r\n")
    assert texts(open_source(str(tmp_path / "a.txt"))) == {"a.txt": "one\n\ntwo\r\n"}


def test_every_line_of_a_jsonl_file_is_a_document_or_says_why_not(tmp_path):
    lines = [
        b'{"text": "one"}',
        b"{bad",
        b'{"body": "x"}',
        b"",
        b'{"text": 3}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'["text"]',
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = list(texts(open_source(str(tmp_path / "a.jsonl"))).items())
    assert [name for name, _ in found] == [f"a.jsonl line {i}" for i in range(1, 11)]
    wanted = [
        "one",
        "!not valid JSON",
        "!no key 'text'",
        "",
        "!text expected, not int",
        "!not valid UTF-8",
        "!not valid UTF-8",
        "!nested more than 64 deep",
        "!no key 'text'",
        "last",
    ]
    for (_, text), start in zip(found, wanted, strict=True):
        assert text.startswith(start.replace("!", "unreadable: ")) and bool(text) == bool(start)


def test_a_jsonl_file_is_read_under_another_key_when_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": "two"}\n')
    assert list(texts(open_source(str(tmp_path / "a.jsonl"), json_key="body")).values()) == ["one"]


def test_a_directory_gives_its_files_in_order_of_their_names_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a/z.py", "a/b.md", "a/.hidden", ".git/x.txt", "__pycache__/y.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a/photo").write_bytes(b"\xff\xd8\xff")
    found = texts(open_source(str(tmp_path), "directory"))
    assert list(found) == ["a/b.md", "a/photo", "a/z.py", "b.txt"]
    assert found["a/photo"].startswith("unreadable: not valid UTF-8")
    assert list(texts(open_source(str(tmp_path), suffixes=(".py", ".txt")))) == ["a/z.py", "b.txt"]


def test_a_file_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "b.txt").write_text("text")
    assert texts(open_source(str(tmp_path))) == {
        "a.txt": "unreadable: No such file or directory",
        "b.txt": "text",
    }


@pytest.mark.parametrize(
    "shape", ["saved", "saved with splits", "parquet directory", "parquet", "json", "csv"]
)
def test_a_data_set_is_read_from_the_shapes_it_is_kept_in(tmp_path, shape):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    path = tmp_path / "data"
    if shape == "saved":
        rows.save_to_disk(str(path))
    elif shape == "saved with splits":
        datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(path))
    elif shape == "parquet directory":
        path.mkdir()
        rows.to_parquet(path / "train-0.parquet")
    else:
        path = path.with_suffix(f".{shape}")
        getattr(rows, f"to_{shape}")(path)
    assert list(texts(open_source(str(path))).values()) == ["one", "two"]
    if shape == "saved with splits":
        assert list(texts(open_source(str(path), split="test")).values()) == ["two"]
    with pytest.raises(UserError, match="no column 'body' in split 'train'; there is text, id"):
        open_source(str(path), column="body")


def test_a_row_without_text_says_so(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["one", None]}).save_to_disk(str(tmp_path / "data"))
    assert texts(open_source(str(tmp_path / "data"))) == {
        "row 0": "one",
        "row 1": "unreadable: text expected, not NoneType",
    }


def test_the_format_can_be_given_where_the_suffix_tells_nothing(tmp_path):
    path = tmp_path / "corpus.dump"
    path.write_text(json.dumps({"text": "one"}) + "\n")
    with pytest.raises(UserError, match="no format goes with the suffix '.dump'"):
        open_source(str(path))
    assert list(texts(open_source(str(path), "jsonl")).values()) == ["one"]


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/for/ever"])
def test_a_path_that_does_not_exist_is_refused_and_not_looked_up_elsewhere(name):
    with pytest.raises(UserError, match="no such file or directory"):
        open_source(name)


def test_a_format_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match="is not a directory"):
        open_source(str(tmp_path / "a.txt"), "directory")
    with pytest.raises(UserError, match="is a directory; use --input-format directory or datasets"):
        open_source(str(tmp_path), "text")
    with pytest.raises(
        UserError, match="a.txt is not jsonl by its suffix; leave it out with --exclude"
    ):
        open_source(str(tmp_path), "jsonl")
    with pytest.raises(UserError, match="no file that ends in .py there"):
        open_source(str(tmp_path), suffixes=(".py",))
    with pytest.raises(UserError, match="--suffix chooses among the files of a directory"):
        open_source(str(tmp_path / "a.txt"), suffixes=(".txt",))
    with pytest.raises(UserError, match="as a file of a data set it must end in .parquet or"):
        open_source(str(tmp_path / "a.txt"), "datasets")
    with pytest.raises(UserError, match="no split 'nosuch'; there is train"):
        open_source(str(tmp_path), "datasets", split="nosuch")
