"""Turn text into the .bin and .idx files that Megatron-Core's data sets read.

    python tools/preprocess_data.py INPUT --output PREFIX --tokenizer DIR
    python tools/preprocess_data.py INPUT --output PREFIX --train-tokenizer 32000

INPUT is a text file (one document), a .jsonl file (one document a line, under --json-key), a directory (every text
file below it a document, hidden ones left out), a path or name that `datasets.load_dataset` takes (--column of
--split), or a quoted pattern of files such as 'data/*.parquet'. With --input-format auto, a file is judged by its
suffix (.jsonl .ndjson; .txt .text .md .rst .py; .parquet .arrow .json .csv for datasets), and a name that is no path is
a data set's. A directory is a data set if it was saved by `datasets`, holds .parquet or .arrow files, or holds files of
records (.jsonl .json .csv) and either is a clone of the hub's or holds nothing else but README and LICENSE. A file that
would be left out, or read as what it is not, is an error: say what to read with --suffix, a pattern, or --input-format
directory (all of it is text).

Writes PREFIX.bin, PREFIX.idx, PREFIX.json (counts, highest token id, hashes) and, with --train-tokenizer,
PREFIX-tokenizer. Every document ends with the tokenizer's end-of-document token. Documents that are empty or cannot
be read are left out, counted, and the first ten named on stderr. A special token that a text spells stays text, which
is counted and said; --parse-special-tokens makes it the token that generation, transformers and vLLM read there.

Exit codes: 0 written, 2 the input or the arguments are wrong, 1 a fault.
"""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from mixtrain.closed_pipe import ended  # noqa: E402
from mixtrain.data.preprocess import preprocess  # noqa: E402
from mixtrain.data.sources import FORMATS, open_source  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems  # noqa: E402


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", metavar="INPUT", help="file, directory, or name of a data set")
    add("--output", metavar="PREFIX", required=True, help="where to write PREFIX.bin, PREFIX.idx and PREFIX.json")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="DIR", type=Path, help="a Hugging Face tokenizer directory")
    tokenizer.add_argument(
        "--train-tokenizer", metavar="VOCAB_SIZE", type=int, help="train a byte-level BPE of this size on the input"
    )
    add("--input-format", choices=FORMATS, default="auto", help="what INPUT is (default: auto)")
    add("--json-key", default="text", help="key of the text in a .jsonl line (default: text)")
    add("--suffix", nargs="+", default=(), help="take files of a directory that end so: --suffix .py .rst")
    add("--split", help="split of a data set, or a part of it: 'train[:10%%]', 'train[:900]+test' (default: train)")
    add("--subset", metavar="NAME", help="subset (configuration) of a data set that has several")
    add("--column", default="text", help="column of a data set that holds the text (default: text)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenize (default: %(default)s, the cores)")
    add(
        "--parse-special-tokens", action="store_true",
        help="a special token that a text spells, as </s> of a rendered chat, is that token (default: it stays text)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing output")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse_arguments()
    try:
        source = open_source(
            args.input, args.input_format, json_key=args.json_key, suffixes=tuple(args.suffix),
            split=args.split, column=args.column, subset=args.subset,
        )  # fmt: skip
        facts = preprocess(
            source, Path(args.output), args.tokenizer, train_vocab_size=args.train_tokenizer,
            workers=args.workers, overwrite=args.overwrite, parse_special_tokens=args.parse_special_tokens,
        )  # fmt: skip
    except UserError as error:
        print_problems(error.problems)
        return REFUSED
    except BrokenProcessPool:
        print("preprocess: a worker was killed, perhaps for want of memory; nothing was written", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("preprocess: interrupted, nothing was written", file=sys.stderr)
        return FAULT
    print(
        f"{args.output}: {facts['documents']:,} documents, {facts['tokens']:,} tokens ({facts['dtype']}), "
        f"{facts['empty']:,} empty and {facts['unreadable']:,} unreadable left out; "
        f"vocabulary {facts['vocab_size']:,}, highest id {facts['max_token_id']:,}, "
        f"tokenizer {Path(args.output).parent / facts['tokenizer']}"
    )
    return FINISHED


if __name__ == "__main__":
    sys.exit(ended(main))
