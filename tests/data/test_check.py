import json
import os
import shutil
import struct
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

from mixtrain.config.data_blend import parse_blend, split_ranges
from mixtrain.data.check import check_files
from mixtrain.data.datasets import build
from mixtrain.data.index import HEADER, entries_problem, read_index
from mixtrain.errors import UserError


@pytest.fixture
def copied(indexed, tmp_path) -> str:
    """The prefix of a copy of the small dataset, which a test may damage."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{indexed}{suffix}", tmp_path / f"copy{suffix}")
    return str(tmp_path / "copy")


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


def test_good_data_has_no_problem(indexed, tokenizer):
    assert check_files([indexed], tokenizer, 512, "80,10,10", (10, 10, 10)) == []


def test_two_names_of_one_file_are_found_through_any_link(indexed, copied, tokenizer, tmp_path):
    # a copy is not recognised as the same data
    assert check_files(["0.3", indexed, "0.7", copied], tokenizer, 600) == []
    for number, link in enumerate((os.symlink, os.link)):
        other = str(tmp_path / f"link{number}")
        for suffix in (".bin", ".idx", ".json"):
            link(f"{copied}{suffix}", f"{other}{suffix}")
        assert only(check_files([copied, other], tokenizer, 512)).startswith(
            f"data.data_path has {copied} and {other}, which are the same data"
        )
    (tmp_path / "there").symlink_to(tmp_path)
    assert len(check_files([copied, f"{tmp_path}/there/copy", indexed], tokenizer, 512)) == 1


def test_files_that_are_missing_are_named(copied, tokenizer):
    Path(f"{copied}.bin").unlink()
    assert only(check_files([copied], tokenizer, 512)) == f"data.data_path: no file {copied}.bin"
    Path(f"{copied}.idx").unlink()
    assert f"no file {copied}.bin and no file {copied}.idx" in only(
        check_files([copied], tokenizer, 512)
    )
    problem = only(check_files([f"{copied}.bin"], tokenizer, 512))
    assert problem.endswith(f"data.data_path takes the prefix {copied}")


def test_a_file_that_is_no_index_is_named_with_what_it_holds(copied, tokenizer):
    Path(f"{copied}.idx").write_bytes(b"PK\x03\x04 something else altogether, but long enough")
    problem = only(check_files([copied], tokenizer, 512))
    assert problem.startswith(f"{copied}.idx: not a Megatron index, it starts with b'PK\\x03\\x04")
    Path(f"{copied}.idx").write_bytes(b"MMIDIDX\x00\x00")
    assert "not a Megatron index" in only(check_files([copied], tokenizer, 512))


def test_tokens_that_are_no_whole_numbers_are_refused(copied):
    change(copied, 17, b"\x06")  # float64
    with pytest.raises(UserError, match="version 1, token type 6"):
        read_index(copied)


def test_a_bin_of_another_size_than_its_index_says_is_named_with_both_numbers(copied, tokenizer):
    size = Path(f"{copied}.bin").stat().st_size
    with open(f"{copied}.bin", "r+b") as stream:
        stream.truncate(size - 2)
    problem = only(check_files([copied], tokenizer, 512))
    assert problem == f"{copied}.bin: {size - 2:,} bytes, but {copied}.idx implies {size:,}"


def test_an_index_cut_short_is_named_with_both_numbers(copied, tokenizer):
    size = Path(f"{copied}.idx").stat().st_size
    with open(f"{copied}.idx", "r+b") as stream:
        stream.truncate(size - 8)
    assert f"{size - 8:,} bytes, but its header (16 sequences) implies {size:,}" in only(
        check_files([copied], tokenizer, 512)
    )


def test_an_empty_data_set_is_refused(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    IndexedDatasetBuilder(str(tmp_path / "x.bin")).finalize(str(tmp_path / "x.idx"))
    with pytest.raises(UserError, match="x.idx: an empty data set"):
        read_index(str(tmp_path / "x"))


def test_an_index_says_where_every_document_begins(indexed):
    assert entries_problem(read_index(indexed)) is None
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs = IndexedDataset(indexed)
    ours = read_index(indexed)
    ends = [2 * int(length) for length in theirs.sequence_lengths]
    assert [ours.offset(i) for i in range(17)] == [sum(ends[:i]) for i in range(17)]


# of the sixteen documents
LENGTH = HEADER.size
OFFSET = HEADER.size + 4 * 16
BOUNDARY = HEADER.size + 12 * 16


@pytest.mark.parametrize(
    "position, layout, value, said",
    [
        (
            LENGTH + 4 * 6,
            "<i",
            -5,
            f"sequence 6 of document 6 has -5 tokens (byte {LENGTH + 24}); the minimum is 0",
        ),
        (
            LENGTH,
            "<i",
            -1,
            f"sequence 0 of document 0 has -1 tokens (byte {LENGTH}); the minimum is 0",
        ),
        (
            LENGTH + 4 * 6,
            "<i",
            2**31 - 1,
            f"sequence 6 of document 6 has {2**31 - 1:,} tokens (byte {LENGTH + 24}) and so",
        ),
        (
            LENGTH + 4 * 6,
            "<i",
            1,
            f"sequence 7 of document 7 begins at byte {{at 7}} of the {{size}}"
            f" bytes of {{bin}} (byte {OFFSET + 56}), but the one before it ends"
            f" at {{at 6 + 2}}",
        ),
        (
            OFFSET + 8 * 7,
            "<q",
            -2,
            f"sequence 7 of document 7 begins at byte -2 of the {{size}} bytes"
            f" of {{bin}} (byte {OFFSET + 56}), but the one before it ends at"
            f" {{at 7}}",
        ),
        (
            OFFSET + 8 * 7,
            "<q",
            2**62,
            f"sequence 7 of document 7 begins at byte {2**62:,} of the {{size}} bytes",
        ),
        (
            OFFSET,
            "<q",
            2,
            f"sequence 0 of document 0 begins at byte 2 of the {{size}} bytes of {{bin}}"
            f" (byte {OFFSET}), but the first begins at 0",
        ),
        (BOUNDARY, "<q", 1, f"document boundary 0 (byte {BOUNDARY}) is 1, but the first must be 0"),
        (
            BOUNDARY + 8 * 5,
            "<q",
            3,
            f"document boundary 5 (byte {BOUNDARY + 40}) is 3, but the one before it is 4",
        ),
        (
            BOUNDARY + 8 * 5,
            "<q",
            -1,
            f"document boundary 5 (byte {BOUNDARY + 40}) is -1, but the one before it is 4",
        ),
        (
            BOUNDARY + 8 * 5,
            "<q",
            99,
            f"document boundary 5 (byte {BOUNDARY + 40}) is 99, but there are 16 sequences",
        ),
        (
            BOUNDARY + 8 * 16,
            "<q",
            15,
            f"the last document boundary (byte {BOUNDARY + 128}) is 15, but there are 16 seq",
        ),
    ],
)
@pytest.mark.parametrize("block", [1, 3, 5, 1000])
def test_a_wrong_entry_anywhere_in_an_index_is_named_by_file_document_and_byte(
    position, layout, value, said, block, copied, tokenizer, monkeypatch
):
    monkeypatch.setattr("mixtrain.data.index.BLOCK", block)
    good = read_index(copied)
    facts = {
        "{at 7}": f"{good.offset(7):,}",
        "{at 6 + 2}": f"{good.offset(6) + 2:,}",
        "{size}": f"{good.bin_bytes:,}",
    }
    change(copied, position, struct.pack(layout, value))
    for name, fact in (facts | {"{bin}": f"{copied}.bin"}).items():
        said = said.replace(name, fact)
    assert only(check_files([copied], tokenizer, 512, every_entry=True)).startswith(
        f"{copied}.idx: {said}"
    )


@pytest.mark.parametrize(
    "position, layout, value", [(LENGTH + 4 * 15, "<i", -1), (OFFSET + 8 * 15, "<q", -8)]
)
def test_a_negative_last_entry_is_named_without_reading_the_others(
    position, layout, value, copied, tokenizer
):
    change(copied, position, struct.pack(layout, value))
    problem = only(check_files([copied], tokenizer, 512))
    assert problem.startswith(f"{copied}.idx: the last sequence has ") and problem.endswith(
        f"(byte {position})"
    )


def test_every_byte_of_an_index_counts(copied):
    """A change of any byte is reported."""
    for position in range(Path(f"{copied}.idx").stat().st_size):
        with open(f"{copied}.idx", "r+b") as stream:
            stream.seek(position)
            (was,) = stream.read(1)
        change(copied, position, bytes([was ^ 1 << position % 8]))
        try:
            problem = entries_problem(read_index(copied))
        except UserError as error:
            problem = str(error)
        assert problem, position
        change(copied, position, bytes([was]))


def test_sequences_that_share_a_document_and_empty_ones_are_right(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"))
    builder.add_document(torch.arange(7), [3, 4])
    builder.add_document(torch.arange(0), [0])
    builder.add_document(torch.arange(5), [5])
    builder.finalize(str(tmp_path / "x.idx"))
    index = read_index(str(tmp_path / "x"))
    assert entries_problem(index) is None
    assert [index.document(sequence) for sequence in range(4)] == [0, 0, 1, 2]


def test_an_index_without_document_boundaries_is_refused(copied, tokenizer):
    change(copied, 26, struct.pack("<Q", 0))
    with open(f"{copied}.idx", "r+b") as stream:
        stream.truncate(BOUNDARY)
    assert "no document boundary" in only(check_files([copied], tokenizer, 512))


def test_an_index_that_cannot_be_read_is_named(copied, tokenizer):
    Path(f"{copied}.idx").unlink()
    Path(f"{copied}.idx").symlink_to("/proc/self/mem")  # reading it is an error, for root too
    assert only(check_files([copied], tokenizer, 512)) == (
        f"{copied}.idx: cannot be read: Input/output error"
    )


@pytest.mark.parametrize(
    "data_path, problem",
    [
        ([], "data.data_path is empty"),
        (None, "data.data_path is empty"),
        (["0.3", "a", "0.7"], "does not alternate weights and prefixes"),
        (["0.3", "a", "b", "c"], "does not alternate weights and prefixes"),
        (["a", "0.3"], "does not alternate weights and prefixes"),
        (["0.3", "0.7"], "does not alternate weights and prefixes"),
        (["0", "a", "1", "b"], "the weight 0.0 of a must be above 0"),
        (["nan", "a"], "the weight nan of a must be above 0"),
    ],
)
def test_a_malformed_list_of_data_is_refused(data_path, problem, tokenizer):
    assert problem in only(check_files(data_path, tokenizer, 512))


@pytest.mark.parametrize(
    "data_path", [["a"], ["a", "b"], ["a", "b", "c"], ["1", "a"], ["30", "a", "70", " b "]]
)
def test_a_list_of_data_means_what_it_means_to_megatron(data_path):
    assert parse_blend(data_path) == get_blend_from_list(data_path)


def test_every_problem_is_reported_at_once(copied, tokenizer, tmp_path):
    problems = check_files([copied, str(tmp_path / "gone")], tokenizer, 300, "1,0,0", (10, 10, 0))
    assert len(problems) == 4
    assert [
        any(word in problem for problem in problems)
        for word in ("no token", "gone", "token id", "has 512 tokens")
    ]


@pytest.mark.parametrize("documents", [1, 2, 3, 10, 16, 159, 1000])
@pytest.mark.parametrize("split", ["90,5,5", "969,30,1", "1,1,1", "99,1,0", "0.8,0.1,0.1", "1,0,3"])
def test_a_split_is_cut_where_megatron_cuts_it(split, documents):
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for ours, theirs in zip(split_ranges(documents, split), matrix, strict=True):
        if theirs is None:
            assert ours[0] == ours[1]
        else:
            assert ours == tuple(int(round(end * float(documents))) for end in theirs)


@pytest.mark.parametrize("split", ["", "0,0,0", "a,b", "90,5,3,2", "-1,2,3"])
def test_a_malformed_split_is_refused(split, indexed, tokenizer):
    assert f'data.split = "{split}" must be three numbers' in only(
        check_files([indexed], tokenizer, 512, split)
    )


def test_a_split_without_a_token_is_refused_only_where_samples_are_wanted(indexed, tokenizer):
    problem = only(check_files([indexed], tokenizer, 512, "969,30,1", (10, 0, 7)))
    assert problem.startswith(
        f'data.split = "969,30,1" gives test no token of {indexed} (0 of its 16 documents)'
    )
    assert "7 samples are wanted" in problem
    assert check_files([indexed], tokenizer, 512, "969,30,1", (10, 0, 0)) == []


def test_a_part_that_cannot_fill_one_sequence_is_refused_with_both_numbers(indexed, tokenizer):
    index = read_index(indexed)
    tokens = (index.bin_bytes - index.offset(15)) // 2
    split = dict(split="80,14,6", samples=(10, 0, 7))
    assert split_ranges(16, "80,14,6")[2] == (15, 16)
    assert check_files([indexed], tokenizer, 512, **split, seq_length=tokens - 1) == []
    problem = only(check_files([indexed], tokenizer, 512, **split, seq_length=tokens))
    assert problem == (
        f'data.split = "80,14,6" gives test {tokens} tokens of {indexed} (1 of its 16 documents),'
        f" but 7 samples are wanted, and one takes data.seq_length + 1 = {tokens + 1}; give it a"
        " larger share, as in data.split='90,5,5', or data.split='80,14,0'"
    )
    assert check_files([indexed], tokenizer, 512, "80,14,6", (10, 0, 0), seq_length=tokens) == []


@pytest.mark.parametrize(
    "name, way", [("train", "or more text"), ("valid", "or trainer.limit_val_batches=0")]
)
def test_a_part_that_is_too_short_is_told_how_to_do_without(name, way, indexed, tokenizer):
    samples = [10 * (part == name) for part in ("train", "valid", "test")]
    problem = only(check_files([indexed], tokenizer, 512, "80,14,6", samples, seq_length=10**6))
    assert f" gives {name} " in problem and problem.endswith(way)


def test_a_tokenizer_that_is_not_there_is_named(indexed, tmp_path):
    assert "data.tokenizer is not set" in only(check_files([indexed], None, 512))
    gone = only(check_files([indexed], tmp_path / "gone", 512))
    assert gone.endswith("gone: no such directory; give a Hugging Face tokenizer directory")
    assert "no tokenizer.json there" in only(check_files([indexed], tmp_path, 512))


def test_a_vocabulary_that_does_not_fit_the_model_is_named_with_both_numbers(indexed, tokenizer):
    highest = json.loads(Path(f"{indexed}.json").read_text())["max_token_id"]
    sidecar, ours = check_files([indexed], tokenizer, 511) if highest == 511 else (None, None)
    assert (
        f"{indexed}.json: the data holds token id 511, but model.vocab_size = 511; use at least 512"
    ) == sidecar
    assert ours == (
        f"data.tokenizer = {tokenizer} has 512 tokens, more than model.vocab_size ="
        " 511; use at least 512"
    )


def test_data_made_with_another_tokenizer_is_refused(indexed, tokenizer, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tokenizer / name).read_text() + "\n")
    assert "was made by another tokenizer" in only(check_files([indexed], tmp_path, 512))


def test_data_of_megatrons_own_tool_needs_no_description(copied, tokenizer):
    Path(f"{copied}.json").unlink()
    assert check_files([copied], tokenizer, 512) == []
    Path(f"{copied}.json").write_text("{}")
    assert "not a description written by tools/preprocess_data.py" in only(
        check_files([copied], tokenizer, 512)
    )


def change(prefix: str, position: int, content: bytes) -> None:
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.seek(position)
        stream.write(content)


def test_of_several_sequences_a_document_sequences_are_counted_as_megatron_cuts_them(
    indexed, tokenizer, tmp_path
):
    there = IndexedDataset(indexed)
    prefix = str(tmp_path / "several")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=there[0].dtype.type)
    for document in range(8):  # two sequences each
        builder.add_document(
            numpy.concatenate([there[2 * document], there[2 * document + 1]]),
            [
                len(there[2 * document]),
                len(there[2 * document + 1]),
            ],
        )
    builder.finalize(f"{prefix}.idx")
    assert len(IndexedDataset(prefix)) == 16 and len(IndexedDataset(prefix).document_indices) == 9
    problem = only(check_files([prefix], tokenizer, 512, "969,30,1", (10, 0, 7)))
    assert f"gives test no token of {prefix} (0 of its 16 sequences)" in problem
    said: list[str] = []
    build(
        "indexed",
        data_path=[prefix],
        split="75,13,12",
        seq_length=32,
        seed=7,
        train_samples=20,
        valid_samples=0,
        test_samples=0,
        tokenizer_dir=tokenizer,
        vocab_size=512,
        path_to_cache=tmp_path / "cache",
        log=said.append,
    )
    assert "from 12 sequences of several" in said[0]
