"""Turn text into the .bin and .idx files that Megatron-Core's data sets read.

    python tools/preprocess_data.py INPUT --output PREFIX --tokenizer DIR
    python tools/preprocess_data.py INPUT --output PREFIX --train-tokenizer 32000

INPUT is a text file (one document), a .jsonl file (one document a line, under --json-key), a
directory, a path or name that `datasets.load_dataset` takes (--column of --split), or a quoted
pattern of files such as 'data/*.parquet'. A file is read as its suffix says: .jsonl .ndjson as JSON
lines; .txt .text .md .rst .py as text; .parquet .arrow .json .csv .tsv by `datasets`; all but
.parquet and .arrow also compressed (.gz .bz2 .xz .zst behind it). A name that is no path is a data
set's.

In a directory a suffix means the same, and its files are read in order of their names, those of
folders in it as well, hidden ones left out. README and LICENSE are documents among text, and none
beside data. JSON lines are a data set where the directory is a clone of the hub's or has a split
for tests or validation, or --split, --subset or --column is given. A file that would be left out,
or has a suffix that says nothing, and text beside data are errors: say what to read with --suffix
(each file as its suffix says, and text if it says nothing), --exclude, a pattern, or --input-format
directory (all of it is text).

Writes PREFIX.bin, PREFIX.idx, PREFIX.json (counts, highest token id, hashes) and, with
--train-tokenizer, PREFIX-tokenizer. Every document ends with the tokenizer's end-of-document token.
Documents that are empty or cannot be read are left out, counted, and the first ten named on stderr;
if many cannot be read, that is an error (--max-unreadable). A special token that a text spells
stays text, which is counted and said; --parse-special-tokens makes it the token that generation,
transformers and vLLM read there. While it runs, its output is in PREFIX.writing.

Exit codes: 0 written, 2 the input or the arguments are wrong, 1 a fault, 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import fraction, run  # noqa: E402
from mixtrain.data.formats import FORMATS  # noqa: E402
from mixtrain.data.preprocess import preprocess  # noqa: E402
from mixtrain.data.sources import open_source  # noqa: E402
from mixtrain.errors import FINISHED  # noqa: E402


def parse_arguments(words: list[str]) -> argparse.Namespace:
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
        help="take files of a directory that end so: --suffix .py .rst",
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
        help="processes that tokenize (default: %(default)s, the cores)",
    )
    add(
        "--parse-special-tokens", action="store_true",
        help="a special token that a text spells, as </s> of a rendered chat, is that token"
             " (default: it stays text)",
    )  # fmt: skip
    add(
        "--max-unreadable", type=fraction, metavar="SHARE",
        help="of the documents that may be left out unread: 0.5 (default: 0.01, or two if they are"
             " less than half)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing output")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse_arguments(words)
    source = open_source(
        args.input, args.input_format, json_key=args.json_key, suffixes=tuple(args.suffix),
        exclude=tuple(args.exclude), split=args.split, column=args.column, subset=args.subset,
    )  # fmt: skip
    facts = preprocess(
        source, Path(args.output), args.tokenizer, train_vocab_size=args.train_tokenizer,
        workers=args.workers, overwrite=args.overwrite, max_unreadable=args.max_unreadable,
        parse_special_tokens=args.parse_special_tokens,
    )  # fmt: skip
    print(
        f"{args.output}: {facts['documents']:,} documents, {facts['tokens']:,} tokens"
        f" ({facts['dtype']}), {facts['empty']:,} empty and {facts['unreadable']:,} unreadable"
        f" left out; vocabulary {facts['vocab_size']:,}, highest id {facts['max_token_id']:,},"
        f" tokenizer {Path(args.output).parent / facts['tokenizer']}"
    )
    return FINISHED


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
