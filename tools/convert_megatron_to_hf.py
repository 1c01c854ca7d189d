"""Convert a mixtrain checkpoint of any run and layout to a directory for transformers and vLLM.

    python tools/convert_megatron_to_hf.py runs/laptop OUT_DIR        # the run's newest checkpoint
    python tools/convert_megatron_to_hf.py runs/laptop/iter_0000100 OUT_DIR --dtype bf16

OUT_DIR must be new. It gets safetensors files with the names on the hub, config.json, and the
tokenizer that is beside the checkpoint. --layout fused writes the names that transformers 5 uses in
memory, which only transformers 5 opens: transformers 4 initializes the experts at random, and vLLM,
MLX and llama.cpp refuse them. A model that transformers would compute differently (sinkhorn or
sigmoid scores, capacity dropping ...) is refused by its key. The files with the
weights are hashed while they are copied: if one is damaged, there is no OUT_DIR.

Exit codes: 0 done, 2 the checkpoint or the arguments are wrong (nothing was written), 1 any other
failure, 130 interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

# mixtrain need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import byte_size, directory_size, positive_int, run  # noqa: E402


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("ckpt_dir", type=Path, help="a checkpoint, or a directory whose newest one is converted")
    add("out_dir", type=Path, help="a new directory for the model")
    add(
        "--layout",
        choices=["hub", "fused"],
        default="hub",
        help="names and shapes of the tensors; fused is for transformers 5 only (default: hub)",
    )
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: unchanged)")
    add(
        "--max-shard-size",
        type=byte_size,
        default="5GB",
        metavar="SIZE",
        help="of a file (default: 5GB)",
    )
    add("--tokenizer", type=Path, metavar="DIR", help="(default: the one beside the checkpoint)")
    add(
        "--allow-other-tokenizer",
        action="store_true",
        help="use --tokenizer DIR even if the model was trained with another one",
    )
    add(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of processes that copy in parallel (default: 1)",
    )
    add(
        "--verify",
        choices=["full", "size"],
        default="full",
        help="check the checkpoint's files by SHA-256, or by size only (default: full)",
    )
    add("--allow-nonfinite", action="store_true", help="convert NaN and infinite numbers, too")
    args = parser.parse_args(argv)

    # these imports take seconds
    from mixtrain.engine.compat import megatron_fixes

    megatron_fixes.apply()
    from mixtrain.interop.convert import to_hf
    from mixtrain.interop.convert.dtype_cast import DTYPES

    if args.layout == "fused":
        print(
            "--layout fused: only transformers 5 opens this; transformers 4 initializes the experts"
            " at random, vLLM, MLX and llama.cpp refuse it; --layout hub is for all",
            file=sys.stderr,
        )
    started = time.monotonic()
    checkpoint = to_hf.convert(
        args.ckpt_dir,
        args.out_dir,
        layout=args.layout,
        dtype=DTYPES.get(args.dtype),
        max_shard_size=args.max_shard_size,
        tokenizer=args.tokenizer,
        allow_other_tokenizer=args.allow_other_tokenizer,
        processes=args.processes,
        verify=args.verify == "full",
        allow_nonfinite=args.allow_nonfinite,
    )
    seconds = time.monotonic() - started
    print(f"{args.out_dir}: {checkpoint}, {directory_size(args.out_dir)} in {seconds:.1f} s")
    if not (args.out_dir / "tokenizer.json").is_file():
        print(f"without a tokenizer: none is beside {checkpoint}; --tokenizer DIR gives one")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
