"""Convert a Mixtral or Qwen3-MoE of Hugging Face to a Megatron-Core checkpoint that every layout
reads.

    python tools/convert_hf_to_megatron.py HF_DIR OUT_DIR
    python tools/convert_hf_to_megatron.py HF_DIR OUT_DIR --dtype bf16 --write-model-config my_model

HF_DIR has config.json and safetensors files, single or sharded, of fp32, fp16 or bf16, with an
expert in each tensor (as on the hub) or all experts in one (transformers 5,
save_original_format=False). OUT_DIR must be new. It gets release/, the checkpoint, in the same
dtype unless told otherwise, and tokenizer/, its tokenizer. Training starts from it with
checkpoint.load_weights=OUT_DIR. Memory does not grow with the model, and a conversion that was
killed leaves nothing that looks whole: run it again.

Exit codes: 0 done, 2 the files or the arguments are wrong (nothing was written), 1 a fault, 130
interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import directory_size, positive_int, run  # noqa: E402
from mixtrain.config.compose import CONF  # noqa: E402
from mixtrain.errors import UserError  # noqa: E402


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_dir", type=Path, help="the model of Hugging Face")
    parser.add_argument("out_dir", type=Path, help="a new directory for the checkpoint")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: as they are)"
    )
    parser.add_argument(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="that copy side by side (default: 1)",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="convert NaN and infinite numbers, too"
    )
    parser.add_argument(
        "--write-model-config", metavar="NAME", help="write conf/model/NAME.yaml from config.json"
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive_int,
        default=1,
        metavar="N",
        help="add rows to the vocabulary, for tensor parallelism to divide it; an export cuts them"
        " (default: 1, none)",
    )
    given = parser.parse_args(words)

    from mixtrain.engine.compat import megatron_fixes  # takes seconds, as all that follows

    megatron_fixes.apply()
    from mixtrain.config.key_effects import value_of
    from mixtrain.data.tokenizer import instead
    from mixtrain.interop.convert import hf_files, settings, source_config, to_megatron
    from mixtrain.interop.convert.casting import DTYPES

    started = time.monotonic()
    config_file = model_file(given.write_model_config) if given.write_model_config else None
    dtype = DTYPES.get(given.dtype)
    config = to_megatron.convert(
        given.hf_dir,
        given.out_dir,
        dtype,
        given.processes,
        given.allow_nonfinite,
        given.make_vocab_size_divisible_by,
    )
    seconds = time.monotonic() - started
    print(f"{given.out_dir / 'release'}: {directory_size(given.out_dir)} in {seconds:.1f} s")
    tokenizer = given.out_dir / "tokenizer"
    usable = (tokenizer / "tokenizer.json").is_file()
    words = f" data.tokenizer={tokenizer}" if usable else ""
    print(f"train from it with checkpoint.load_weights={given.out_dir}{words}")
    if not usable:
        print(f"its tokenizer: {instead(given.hf_dir)}")
    if config_file:
        keys = settings.from_hugging_face(hf_files.read_config(given.hf_dir))
        values = {key: value_of(config, key) for key in keys}
        config_file.write_text(source_config.model_config(values, f"{given.hf_dir.resolve().name}"))
        softmax = " router.moe_router_pre_softmax=true" * values["router.moe_router_pre_softmax"]
        print(f"its sizes are in {config_file}: model={config_file.stem}{softmax}")
    return 0


def model_file(name: str) -> Path:
    """Where the model's facts go: a name that is free. UserError if it is not."""
    path = CONF / "model" / f"{name}.yaml"
    if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise UserError(
            f"--write-model-config {name}: a name of letters, digits, _, - and . is wanted"
        )
    if path.exists():
        raise UserError(f"--write-model-config {name}: {path} is there already; give another name")
    return path


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
