"""The console commands of an installed mixtrain, as `mixtrain-train` for train.py. No torch.

Each runs the script itself, so that a checkout and an installed package do the same.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable

from mixtrain.paths import ROOT


def _runs(script: str) -> Callable[[], None]:
    def command() -> None:
        path = str(ROOT / script)
        sys.argv[0] = path  # the helper processes of a checkpoint import this file again
        runpy.run_path(path, run_name="__main__")

    return command


train = _runs("train.py")
submit = _runs("tools/submit.py")
preprocess_data = _runs("tools/preprocess_data.py")
convert_tokenizer = _runs("tools/convert_tokenizer.py")
convert_hf_to_megatron = _runs("tools/convert_hf_to_megatron.py")
convert_megatron_to_hf = _runs("tools/convert_megatron_to_hf.py")
convert_to_gguf = _runs("tools/convert_to_gguf.py")
verify_conversion = _runs("tools/verify_conversion.py")
verify_serving = _runs("tools/verify_serving.py")
generate = _runs("tools/generate.py")
checkpoint = _runs("tools/checkpoint.py")
parity = _runs("tools/parity.py")
