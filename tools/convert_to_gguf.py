"""Convert an exported model to a GGUF file for llama.cpp, with llama.cpp's own converter.

    git clone https://github.com/ggml-org/llama.cpp
    python tools/convert_to_gguf.py exported exported.gguf --llama-cpp llama.cpp

The converter knows how a tokenizer splits a text before the merges by a hash of token ids, so it
knows no vocabulary that somebody has trained ("BPE pre-tokenizer was not recognized"). A tokenizer
of `--train-tokenizer`, and the one of the default run, splits as GPT-2's does: that is read in
tokenizer.json, and the converter is told. Every other tokenizer is left to the converter. It runs
in this Python and wants the package sentencepiece beside mixtrain's own.

Exit codes: 0 done, 2 the arguments are wrong, else the converter's.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import run  # noqa: E402
from mixtrain.data.tokenizer import has_scores, splits_as_gpt2  # noqa: E402
from mixtrain.errors import FINISHED, Fault, UserError  # noqa: E402

CONVERTER = "convert_hf_to_gguf"


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export_dir", type=Path, help="what tools/convert_megatron_to_hf.py made")
    parser.add_argument("out_file", type=Path, help="a new .gguf file")
    parser.add_argument(
        "--llama-cpp", type=Path, required=True, metavar="DIR", help="a clone of llama.cpp"
    )
    parser.add_argument(
        "--outtype", default="auto", help="of the weights, as the converter has it (default: auto)"
    )
    given = parser.parse_args(words)
    if not (given.llama_cpp / f"{CONVERTER}.py").is_file():
        raise UserError(
            f"--llama-cpp {given.llama_cpp}: no {CONVERTER}.py there; a clone of llama.cpp is"
            " wanted"
        )
    if given.out_file.exists():
        raise UserError(f"{given.out_file} is there already: give another name, or remove it")
    if not (given.export_dir / "config.json").is_file():
        raise UserError(
            f"{given.export_dir} has no config.json: an export of tools/convert_megatron_to_hf.py"
            " is wanted"
        )
    if not has_scores(given.export_dir):
        raise UserError(
            f"{given.export_dir} has no tokenizer.model: llama.cpp merges by the scores in it, and"
            " would have none; copy it there from the model's directory on the hub"
        )
    sys.path[:0] = [str(given.llama_cpp), str(given.llama_cpp / "gguf-py")]
    writing = given.out_file.with_name(
        f"{given.out_file.name}.writing"
    )  # no half file under the name that was asked for
    words = [str(given.export_dir), "--outfile", str(writing), "--outtype", given.outtype]
    try:
        code = converted(words, splits_as_gpt2(given.export_dir))
        if code == FINISHED:
            writing.rename(given.out_file)
        return code
    except ModuleNotFoundError as error:
        raise UserError(
            f"llama.cpp's converter needs the package {error.name}: pip install {error.name}"
        ) from None
    except NotImplementedError as error:  # what it has no way for: a tokenizer, a kind of model
        raise Fault(f"llama.cpp's converter cannot convert {given.export_dir}: {error}") from None
    finally:
        writing.unlink(missing_ok=True)


def converted(words: list[str], as_gpt2: bool) -> int:
    """The exit code of the converter, told how the tokenizer splits a text if that is as GPT-2's
    does.
    """
    converter = import_module(CONVERTER)
    if as_gpt2:
        text_model(converter).get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = [CONVERTER, *words]
    return converter.main() or FINISHED


def text_model(converter) -> type:
    """The converter's class of language models: in its own file in older versions, in a package
    now.
    """
    return getattr(converter, "TextModel", None) or import_module("conversion.base").TextModel


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
