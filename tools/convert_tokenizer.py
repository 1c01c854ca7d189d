"""Make a Hugging Face tokenizer directory of one of Mistral's own tokenizer files.

    python tools/convert_tokenizer.py Mixtral-8x7B-v0.1/tokenizer.model mixtral-tokenizer
    python tools/convert_tokenizer.py tekken.json OUT_DIR

FILE is a sentencepiece model (tokenizer.model, tokenizer.model.v1, .v2, .v3, .v7) or a tekken.json.
OUT_DIR must be new; it gets tokenizer.json and tokenizer_config.json, which every tool here,
transformers and vLLM read, and a copy of the model, which llama.cpp reads. The ids are compared
with those of the file's own library on some hundred texts first (pip install sentencepiece, or
mistral-common for tekken.json), and a file that cannot be converted exactly is refused. Neither
file has a chat template.

Exit codes: 0 done, 2 the file or the arguments are wrong (nothing was written), 1 a fault, 130
interrupted.
"""

import argparse
import sys
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import run  # noqa: E402


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="tokenizer.model, tokenizer.model.vN or tekken.json"
    )
    parser.add_argument(
        "out_dir", metavar="OUT_DIR", type=Path, help="a new directory for the tokenizer"
    )
    given = parser.parse_args(words)

    from mixtrain.data.convert_tokenizer import convert

    tokens = convert(given.file, given.out_dir)
    print(f"{given.out_dir}: {tokens:,} tokens; train with data.tokenizer={given.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
