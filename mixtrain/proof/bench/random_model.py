"""Writes a Hugging Face Mixtral with random bf16 weights at the widths of Mixtral 8x7B, to convert.

python -m mixtrain.proof.bench.random_model FOLDER LAYERS                 a layer has 2.9 GB
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from mixtrain.config.published_models import published
from mixtrain.interop.convert import checkpoint_config, flat_ranges, hf_config, to_hf
from mixtrain.interop.convert.dtype_cast import DtypeCast

BLOCK = 1 << 26  # bytes


def write(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    overrides = published()["mistralai/Mixtral-8x7B-v0.1"] | {"model.num_layers": layers}
    config = checkpoint_config.configuration(overrides)
    reader = to_hf.MegatronReader(
        None, flat_ranges.build_index(config, "hub"), DtypeCast(torch.bfloat16)
    )
    files = to_hf.plan_files(folder, reader, 5 * 10**9)
    noise = bytearray(os.urandom(BLOCK))
    # absolute values below 2: otherwise one in 256 would be NaN or infinite
    noise[1::2] = bytes(byte & 0xBF for byte in noise[1::2])
    for file in files:
        with open(file.path, "wb") as stream:
            stream.write(to_hf.header(file, reader))
            for start in range(0, file.size, BLOCK):
                stream.write(noise[: min(BLOCK, file.size - start)])
    if len(files) > 1:
        to_hf.write_weight_map(folder / to_hf.INDEX, files, reader)
    (folder / to_hf.CONFIG).write_text(json.dumps(hf_config.to_hugging_face(config)))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
