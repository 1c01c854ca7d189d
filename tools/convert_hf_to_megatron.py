"""Convert a Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE to a Megatron-Core checkpoint.

    python tools/convert_hf_to_megatron.py HF_DIR OUT_DIR
    python tools/convert_hf_to_megatron.py HF_DIR OUT_DIR --dtype bf16 --write-model-config my_model

HF_DIR has config.json and safetensors files, single or sharded, in fp32, fp16 or bf16, with one
tensor per expert (as on the hub) or all experts in one tensor (transformers 5,
save_original_format=False). OUT_DIR must be new. It gets release/, the checkpoint, in the same
dtype unless --dtype is given, and tokenizer/, its tokenizer. Every parallel layout reads it: train
with checkpoint.load_weights=OUT_DIR. Memory does not grow with the model. A killed conversion
leaves nothing that looks complete: run it again.

Exit codes: 0 done, 2 the files or the arguments are wrong (nothing was written), 1 any other
failure, 130 interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

# mixtrain need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import directory_size, positive_int, run  # noqa: E402
from mixtrain.config.compose import CONF  # noqa: E402
from mixtrain.errors import UserError  # noqa: E402


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("hf_dir", type=Path, help="the Hugging Face model")
    add("out_dir", type=Path, help="a new directory for the checkpoint")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: unchanged)")
    add(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of processes that copy in parallel (default: 1)",
    )
    add("--allow-nonfinite", action="store_true", help="convert NaN and infinite numbers, too")
    add("--write-model-config", metavar="NAME", help="write conf/model/NAME.yaml from config.json")
    add(
        "--make-vocab-size-divisible-by",
        type=positive_int,
        default=1,
        metavar="N",
        help="pad the vocabulary so that tensor parallelism divides it; an export removes the"
        " padding (default: 1, none)",
    )
    args = parser.parse_args(argv)

    # these imports take seconds
    from mixtrain.engine.compat import megatron_fixes

    megatron_fixes.apply()
    from mixtrain.config.key_effects import value_of
    from mixtrain.data.tokenizer import no_tokenizer_message
    from mixtrain.interop.convert import checkpoint_config, hf_config, hf_files, to_megatron
    from mixtrain.interop.convert.dtype_cast import DTYPES

    started = time.monotonic()
    yaml_path = new_yaml_path(args.write_model_config) if args.write_model_config else None
    config = to_megatron.convert(
        args.hf_dir,
        args.out_dir,
        DTYPES.get(args.dtype),
        args.processes,
        args.allow_nonfinite,
        args.make_vocab_size_divisible_by,
    )
    seconds = time.monotonic() - started
    print(f"{args.out_dir / 'release'}: {directory_size(args.out_dir)} in {seconds:.1f} s")
    tokenizer = args.out_dir / "tokenizer"
    has_tokenizer = (tokenizer / "tokenizer.json").is_file()
    override = f" data.tokenizer={tokenizer}" if has_tokenizer else ""
    print(f"train from it with checkpoint.load_weights={args.out_dir}{override}")
    if not has_tokenizer:
        print(f"its tokenizer: {no_tokenizer_message(args.hf_dir)}")
    if yaml_path:
        keys = hf_config.from_hugging_face(hf_files.read_config(args.hf_dir))
        values = {key: value_of(config, key) for key in keys}
        yaml_path.write_text(checkpoint_config.model_yaml(values, args.hf_dir.resolve().name))
        softmax = " router.moe_router_pre_softmax=true" * values["router.moe_router_pre_softmax"]
        print(f"its sizes are in {yaml_path}: model={yaml_path.stem}{softmax}")
    return 0


def new_yaml_path(name: str) -> Path:
    """Return conf/model/NAME.yaml. UserError if the name is not valid or taken."""
    path = CONF / "model" / f"{name}.yaml"
    if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise UserError(
            f"--write-model-config {name}: a name may have letters, digits, _, - and . only"
        )
    if path.exists():
        raise UserError(f"--write-model-config {name}: {path} is there already; give another name")
    return path


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
