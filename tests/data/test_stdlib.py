import os
import shutil
import signal
import time

import pytest

from mixtrain.config.data_blend import split_ranges
from mixtrain.data import stdlib
from mixtrain.data.index import read_index
from mixtrain.data.tokenizer import tokenizer_vocab_size
from mixtrain.errors import UserError


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(cache directory, prefix, tokenizer directory, log lines) at the default vocabulary size."""
    cache = tmp_path_factory.mktemp("cache")
    said = []
    return cache, *stdlib.prepare(cache, 4096, said.append), said


def test_the_corpus_is_the_same_list_of_files_in_the_same_order_everywhere():
    names = stdlib.ordered_names()
    assert len(names) == len(set(names)) == 159
    assert names[:3] == [
        "concurrent/futures/process.py",
        "multiprocessing/connection.py",
        "sched.py",
    ]
    assert not any(
        part in name
        for name in names
        for part in ("/test", "encodings/", "tkinter", "_sysconfigdata")
    )


def test_the_corpus_is_four_to_six_megabytes_of_utf8_text():
    files, size, sha256 = stdlib.corpus()
    assert 4_000_000 < size < 6_500_000
    assert size == sum(len(file.read_bytes().decode("utf-8").encode()) for file in files)
    assert stdlib.corpus() == (files, size, sha256)


def test_what_the_files_hold_decides_the_hash(tmp_path):
    files, size, sha256 = stdlib.corpus()
    copy_library(files, tmp_path)
    assert stdlib.corpus(tmp_path)[1:] == (size, sha256)
    with open(tmp_path / "heapq.py", "r+b") as stream:
        stream.write(b"?")
    assert stdlib.corpus(tmp_path)[1] == size
    assert stdlib.corpus(tmp_path)[2] != sha256


def test_a_file_that_the_installation_lacks_is_named(tmp_path):
    copy_library(stdlib.corpus()[0], tmp_path)
    (tmp_path / "pydoc_data/topics.py").unlink()
    with pytest.raises(
        UserError, match="pydoc_data/topics.py: No such file .* use data.kind = indexed"
    ):
        stdlib.corpus(tmp_path)


def test_preparing_says_files_bytes_hash_tokens_and_vocabulary(prepared):
    cache, prefix, tokenizer, said = prepared
    _, size, sha256 = stdlib.corpus()
    for word in ("159 files", f"{size:,} bytes", sha256, "vocabulary 4,096", str(prefix.parent)):
        assert word in "\n".join(said)
    assert tokenizer_vocab_size(tokenizer) == 4096


def test_a_split_of_90_5_5_validates_and_tests_on_enough_ordinary_text(prepared):
    _, prefix, _, _ = prepared
    index = read_index(str(prefix))
    assert index.sequences == 159
    _, valid, test = split_ranges(index.sequences, "90,5,5")
    assert (index.offset(valid[1]) - index.offset(valid[0])) // 2 >= 60_000
    assert (index.offset(test[1]) - index.offset(test[0])) // 2 >= 30_000
    held_out = [range(*part) for part in (valid, test)]
    for part in held_out:
        sizes = [index.offset(i + 1) - index.offset(i) for i in part]
        assert len(sizes) == 8 and max(sizes) < 0.5 * sum(sizes)  # no single file dominates
    assert stdlib.ordered_names().index("pydoc_data/topics.py") < valid[0]


def test_a_second_call_uses_what_the_first_one_made(prepared):
    cache, prefix, tokenizer, _ = prepared
    before = os.stat(f"{prefix}.bin")
    (lock,) = cache.glob("*.lock")
    assert lock.stat().st_mode & 0o777 == 0o600  # only the owner can lock it
    lock.unlink()
    assert stdlib.prepare(cache, 4096, quiet) == (prefix, tokenizer)
    after = os.stat(f"{prefix}.bin")
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(cache.glob("*.lock"))  # readers need no lock file


def test_several_processes_at_once_make_one_data_set(tmp_path):
    children = []
    for i in range(3):
        child = os.fork()
        if not child:
            said = []
            try:
                prefix, _ = stdlib.prepare(tmp_path / "cache", 300, said.append)
                said.append(str(os.stat(f"{prefix}.bin").st_ino))
            finally:
                (tmp_path / f"said-{i}").write_text("\n".join(said))
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    said = [(tmp_path / f"said-{i}").read_text().splitlines() for i in range(3)]
    assert sum(lines[0].startswith("data: waiting for ") for lines in said) == 2
    assert len({lines[-1] for lines in said}) == 1 and all("300" in lines[-2] for lines in said)


def test_what_a_killed_call_left_is_made_again(tmp_path):
    child = os.fork()
    if not child:
        stdlib.prepare(tmp_path, 300, quiet)
        os._exit(0)
    end = time.monotonic() + 30
    while not list(tmp_path.glob("stdlib-*.partial/text.writing/tokenizer/tokenizer.json")):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert left.name.endswith(".partial")
    prefix, _ = stdlib.prepare(tmp_path, 300, quiet)
    assert read_index(str(prefix)).sequences == 159
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [prefix.parent]
    assert sorted(os.listdir(prefix.parent)) == [
        "text-tokenizer",
        "text.bin",
        "text.idx",
        "text.json",
    ]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write and lock it: .* \(data.path_to_cache\)"):
        stdlib.prepare(tmp_path / "file" / "cache", 300, quiet)


def copy_library(files, root) -> None:
    for name, file in zip(stdlib.ordered_names(), files, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / name)
