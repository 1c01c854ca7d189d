"""Tokenize text into the .bin and .idx files that Megatron-Core's datasets read.

    python tools/preprocess_data.py INPUT --output PREFIX --tokenizer DIR
    python tools/preprocess_data.py INPUT --output PREFIX --train-tokenizer 32000

INPUT is a text file (one document), a .jsonl file (one document per line, under --json-key), a
directory, a path or name for `datasets.load_dataset` (--column of --split), or a quoted pattern of
files such as 'data/*.parquet'. The suffix determines the format of a file: .jsonl .ndjson JSON
lines; .txt .text .md .rst .py text; .parquet .arrow .json .csv .tsv read by `datasets`. All but
.parquet and .arrow may be compressed (followed by .gz .bz2 .xz .zst). A name that is not a path is
a dataset of the Hub.

In a directory a suffix means the same. Files are read in order of their names, including those in
subdirectories, without hidden files. README and LICENSE are documents if the other files are text,
and are ignored beside data. JSON lines are read as a dataset if the directory is a clone of a Hub
dataset, if it has a test or validation split, or if --split, --subset or --column is given. It is
an error if a file would be left out, has an unknown suffix, or is text beside data. Then select the
files with --suffix (an unknown suffix means text), --exclude, a pattern, or --input-format
directory (every file is text).

Writes PREFIX.bin, PREFIX.idx, PREFIX.json (counts, highest token id, hashes) and, with
--train-tokenizer, PREFIX-tokenizer. Every document ends with the tokenizer's end-of-document token.
Empty and unreadable documents are left out and counted, and the first ten are named on stderr; too
many unreadable ones are an error (--max-unreadable). If a text spells a special token, it stays
text and is counted; --parse-special-tokens makes it the special token, as generation, transformers
and vLLM read it. Output is written to PREFIX.writing until it is complete.

Exit codes: 0 written; 2 wrong input or arguments; 1 an internal error; 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

# runs from a checkout, without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import fraction, run  # noqa: E402
from mixtrain.data.formats import FORMATS  # noqa: E402
from mixtrain.data.preprocess import preprocess  # noqa: E402
from mixtrain.data.sources import open_source  # noqa: E402
from mixtrain.errors import FINISHED  # noqa: E402


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", metavar="INPUT", help="file, directory, or name of a data set")
    add(
        "--output",
        metavar="PREFIX",
        required=True,
        help="where to write PREFIX.bin, PREFIX.idx and PREFIX.json",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="a Hugging Face tokenizer directory"
    )
    tokenizer.add_argument(
        "--train-tokenizer",
        metavar="VOCAB_SIZE",
        type=int,
        help="train a byte-level BPE of this size on the input",
    )
    add("--input-format", choices=FORMATS, default="auto", help="what INPUT is (default: auto)")
    add("--json-key", metavar="KEY", help="key of the text in a .jsonl line (default: text)")
    add(
        "--suffix",
        nargs="+",
        default=(),
        help="read the files of a directory that end in these: --suffix .py .rst",
    )
    add(
        "--exclude",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="leave files of a directory out: --exclude '*.png'",
    )
    add(
        "--split",
        help="split of a data set, or a part of it: 'train[:10%%]', 'train[:900]+test' (default:"
        " train)",
    )
    add("--subset", metavar="NAME", help="subset (configuration) of a data set that has several")
    add("--column", help="column of a data set that holds the text (default: text)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="tokenizing processes (default: %(default)s, the number of cores)",
    )
    add(
        "--parse-special-tokens", action="store_true",
        help="if a text spells a special token, such as </s> in a rendered chat, make it that"
             " token (default: it stays text)",
    )  # fmt: skip
    add(
        "--max-unreadable", type=fraction, metavar="SHARE",
        help="share of the documents that may be unreadable: 0.5 (default: 0.01, or two documents"
             " if they are less than half)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing output")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    source = open_source(
        args.input, args.input_format, json_key=args.json_key, suffixes=tuple(args.suffix),
        exclude=tuple(args.exclude), split=args.split, column=args.column, subset=args.subset,
    )  # fmt: skip
    description = preprocess(
        source, Path(args.output), args.tokenizer, train_vocab_size=args.train_tokenizer,
        workers=args.workers, overwrite=args.overwrite, max_unreadable=args.max_unreadable,
        parse_special_tokens=args.parse_special_tokens,
    )  # fmt: skip
    print(
        f"{args.output}: {description['documents']:,} documents, {description['tokens']:,} tokens"
        f" ({description['dtype']}), {description['empty']:,} empty and"
        f" {description['unreadable']:,} unreadable left out; vocabulary"
        f" {description['vocab_size']:,}, highest id {description['max_token_id']:,},"
        f" tokenizer {Path(args.output).parent / description['tokenizer']}"
    )
    return FINISHED


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
