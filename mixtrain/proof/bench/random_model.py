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
from mixtrain.interop.convert import settings, source_config, spans, to_hf
from mixtrain.interop.convert.casting import Casting

BLOCK = 1 << 26  # bytes


def write(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    values = published()["mistralai/Mixtral-8x7B-v0.1"] | {"model.num_layers": layers}
    config = source_config.configuration(values)
    origin = to_hf.Origin(None, spans.index(config, "hub"), Casting(torch.bfloat16))
    shards = to_hf.shards_of(folder, origin, 5 * 10**9)
    noise = bytearray(os.urandom(BLOCK))
    # absolute values below 2: otherwise one in 256 would be NaN or infinite
    noise[1::2] = bytes(byte & 0xBF for byte in noise[1::2])
    for shard in shards:
        with open(shard.path, "wb") as file:
            file.write(to_hf.header(shard, origin))
            for start in range(0, shard.size, BLOCK):
                file.write(noise[: min(BLOCK, shard.size - start)])
    if len(shards) > 1:
        to_hf.write_weight_map(folder / to_hf.INDEX, shards, origin)
    (folder / to_hf.CONFIG).write_text(json.dumps(settings.to_hugging_face(config)))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
