"""Convert a checkpoint of mixtrain, of any run and layout, to a directory that transformers and
vLLM open.

    python tools/convert_megatron_to_hf.py runs/laptop OUT_DIR                    the newest
      checkpoint of a run
    python tools/convert_megatron_to_hf.py runs/laptop/iter_0000100 OUT_DIR --dtype bf16

OUT_DIR must be new. It gets safetensors files under the names of the hub (--layout fused: those of
transformers 5's memory, which nothing else opens: transformers 4 takes random experts instead,
vLLM, MLX and llama.cpp refuse them), config.json, and the tokenizer that lies beside the
checkpoint. A run whose model transformers would compute otherwise (sinkhorn or sigmoid scores,
capacity dropping, shared experts ...) is refused, by its key. The files that hold the weights are
hashed while they are copied: if one is damaged, there is no OUT_DIR.

Exit codes: 0 done, 2 the checkpoint or the arguments are wrong (nothing was written), 1 a fault,
130 interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import byte_size, directory_size, positive_int, run  # noqa: E402


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "ckpt_dir", type=Path, help="a checkpoint, or a directory of which to take the newest"
    )
    parser.add_argument("out_dir", type=Path, help="a new directory for the model")
    parser.add_argument(
        "--layout",
        choices=["hub", "fused"],
        default="hub",
        help="names and shapes: fused is for transformers 5 alone (default: hub)",
    )
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: as they are)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_size,
        default="5GB",
        metavar="SIZE",
        help="of a file (default: 5GB)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="(default: the one beside the checkpoint)"
    )
    parser.add_argument(
        "--allow-other-tokenizer", action="store_true", help="take DIR though the model has another"
    )
    parser.add_argument(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="that copy side by side (default: 1)",
    )
    parser.add_argument(
        "--verify",
        choices=["full", "size"],
        default="full",
        help="the checkpoint's files by their SHA-256, or by their sizes alone (default: full)",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="convert NaN and infinite numbers, too"
    )
    given = parser.parse_args(words)

    from mixtrain.engine.compat import megatron_fixes  # takes seconds, as all that follows

    megatron_fixes.apply()
    from mixtrain.interop.convert import to_hf
    from mixtrain.interop.convert.casting import DTYPES

    if given.layout == "fused":
        print(
            "--layout fused: transformers 5 alone opens this; transformers 4 takes random experts"
            " instead, vLLM, MLX and llama.cpp refuse it; --layout hub is for all",
            file=sys.stderr,
        )
    started = time.monotonic()
    checkpoint = to_hf.convert(
        given.ckpt_dir,
        given.out_dir,
        layout=given.layout,
        dtype=DTYPES.get(given.dtype),
        max_shard_size=given.max_shard_size,
        tokenizer=given.tokenizer,
        allow_other_tokenizer=given.allow_other_tokenizer,
        processes=given.processes,
        verify=given.verify == "full",
        allow_nonfinite=given.allow_nonfinite,
    )
    print(
        f"{given.out_dir}: {checkpoint}, {directory_size(given.out_dir)} in"
        f" {time.monotonic() - started:.1f} s"
    )
    if not (given.out_dir / "tokenizer.json").is_file():
        print(f"without a tokenizer: none lies beside {checkpoint}; --tokenizer DIR gives one")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
