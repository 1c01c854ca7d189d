"""Convert one of Mistral's tokenizer files to a Hugging Face tokenizer directory.

    python tools/convert_tokenizer.py Mixtral-8x7B-v0.1/tokenizer.model mixtral-tokenizer
    python tools/convert_tokenizer.py tekken.json OUT_DIR

FILE is a sentencepiece model (tokenizer.model, tokenizer.model.v1, .v2, .v3, .v7) or a tekken.json.
OUT_DIR must not exist. It gets tokenizer.json and tokenizer_config.json, which every tool here,
transformers and vLLM read, and a copy of the sentencepiece model, which llama.cpp reads. First the
ids of several hundred texts are compared with those of the file's own library (pip install
sentencepiece, or mistral-common for tekken.json); a file that cannot be converted exactly is
refused. Neither kind of file has a chat template.

Exit codes: 0 done; 2 wrong file or arguments (nothing was written); 1 an internal error; 130
interrupted.
"""

import argparse
import sys
from pathlib import Path

# runs from a checkout, without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import run  # noqa: E402


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="tokenizer.model, tokenizer.model.vN or tekken.json"
    )
    parser.add_argument(
        "out_dir", metavar="OUT_DIR", type=Path, help="a new directory for the tokenizer"
    )
    args = parser.parse_args(argv)

    from mixtrain.data.convert_tokenizer import convert

    tokens = convert(args.file, args.out_dir)
    print(f"{args.out_dir}: {tokens:,} tokens; train with data.tokenizer={args.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
