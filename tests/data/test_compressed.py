"""Compressed and other files are read in their format or refused; damaged files are refused."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from mixtrain.data.documents import UnreadableDocument
from mixtrain.data.sources import open_source
from mixtrain.errors import UserError

TEXTS = [f"line {number} " + "word " * (number % 50) for number in range(30_000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstandard(content: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(content)
    return stream.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


def read(path, *arguments, **given) -> list[str]:
    # to the end, where the checksum is
    items = list(open_source(str(path), *arguments, **given).documents())
    return [item.text() for item in items]


def refusal(path, *arguments, **given) -> str:
    with pytest.raises(UserError) as refused:
        read(path, *arguments, **given)
    (problem,) = refused.value.problems
    assert "\n" not in problem and problem.startswith(str(path))
    return problem


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_read_as_what_is_in_them(suffix, tmp_path):
    packed = PACK[suffix](LINES)
    # two concatenated streams are one file
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed + packed)
    assert read(tmp_path / f"a.jsonl{suffix}") == TEXTS * 2
    (tmp_path / f"b.TXT{suffix}").write_bytes(PACK[suffix]("zwölf\n".encode() * 3))
    assert read(tmp_path / f"b.TXT{suffix}") == ["zwölf\n" * 3]


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_lines_are_read_as_a_stream_and_counted_in_bytes_of_the_file(suffix, tmp_path):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](LINES))
    source = open_source(str(path))
    blocks = list(source.blocks())
    assert len(blocks) > 5 and max(len(block.data) for block in blocks) < len(LINES) / 4
    assert sum(block.size for block in blocks) == path.stat().st_size == source.total()
    assert [item.name for block in blocks for item in block][-1] == f"{path.name} line {len(TEXTS)}"


@pytest.mark.parametrize(
    "damage", ["cut in half", "cut by a few bytes", "changed", "never compressed", "empty"]
)
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_damaged_file_is_named_and_nothing_of_it_is_taken_for_the_whole(
    kind, suffix, damage, tmp_path
):
    packed = bytearray(PACK[suffix](LINES))
    if (suffix, damage) == (".zst", "changed"):
        pytest.skip("pyarrow writes no checksum, so that nobody can tell")
    if damage == "changed":
        middle = len(packed) // 2
        packed[middle : middle + 8] = bytes(byte ^ 255 for byte in packed[middle : middle + 8])
    cut = {"cut in half": len(packed) // 2, "cut by a few bytes": -3, "empty": 0}.get(damage)
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(LINES if damage == "never compressed" else bytes(packed[:cut]))
    damaged = f"damaged, truncated, or not a {suffix} file"
    said = "the file is empty" if damage == "empty" else damaged
    assert said in refusal(path)


@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl", gzip.compress(LINES), "begins as a .gz file does; give it a name that ends in .gz"),
    ("a.jsonl", zstandard(LINES), "begins as a .zst file does"),
    ("a.jsonl", b"PAR1 and more", "begins as a .parquet file does"),
    ("a.jsonl", b'[{"text": "one"}]', "begins with a JSON array, and JSON lines are objects with"
                                      " the key 'text'"),
    ("a.jsonl", b'\xef\xbb\xbf\n [\n {"text": "one"}\n]', "type --input-format datasets"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, its content"
                                                                 " was not fetched"),
    ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, its"
                                                                    " content was not fetched"),
    ("a.csv.zst", zstandard(b"text\none\n"), "unpack them with zstd -d"),
    ("a.parquet.gz", b"", "no format goes with the suffix '.gz'"),
    ("a.lz4", b"", "no format goes with the suffix '.lz4'"),
    ("a.parquet", b"PAR1", "`datasets` cannot load the split 'train' of it"),
    ("a.arrow", b"ARROW1", "`datasets` cannot load the split 'train' of it"),
])  # fmt: skip
def test_a_file_that_is_not_what_its_name_says_is_refused_with_what_to_do(
    name, content, said, tmp_path
):
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


def test_an_array_is_read_the_way_that_its_refusal_names(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert read(tmp_path / "a.jsonl", "datasets") == ["one", "two"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize(
    "kind, content",
    [
        ("csv", b"text\none\ntwo\n"),
        ("tsv", b"id\ttext\n1\tone\n2\ttwo\n"),
        # fmt: skip
        ("json", b'[{"text": "one"}, {"text": "two"}]'),
    ],
)
def test_tables_of_text_are_read_compressed_or_not(kind, content, suffix, tmp_path):
    (tmp_path / f"a.{kind}").write_bytes(content)
    (tmp_path / f"b.{kind}{suffix}").write_bytes(PACK[suffix](content))
    assert read(tmp_path / f"a.{kind}") == read(tmp_path / f"b.{kind}{suffix}") == ["one", "two"]


def test_a_column_of_bytes_is_text_where_it_is_utf_8(tmp_path):
    column = pyarrow.array(
        [b"one", "zwölf".encode(), b'{"text": "x"}', b"\xff\xd8"], pyarrow.binary()
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    *good, bad = open_source(str(tmp_path / "a.parquet")).documents()
    assert [item.text() for item in good] == ["one", "zwölf", '{"text": "x"}']
    with pytest.raises(UnreadableDocument, match="not valid UTF-8"):
        bad.text()


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_both_kinds_of_arrow_files_are_read(kind, tmp_path):
    table = pyarrow.table({"text": ["one", "two"]})
    with getattr(pyarrow.ipc, f"new_{kind}")(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "a.arrow") == ["one", "two"]
