"""How long a conversion takes and how much memory, against `cp` of the same bytes on the same disk.

    python tools/bench_convert.py                              3 and 8 layers of Mixtral 8x7B: 9 and 24 GB, three pairs
    python tools/bench_convert.py --layers 1 --pairs 5 --csv FILE --folder /data

A pair is one `cp -r` and one conversion, one right after the other, each with what it wrote seen on the disk (sync).
Weights are random bits in bf16, at the widths of Mixtral 8x7B. Memory is the peak of the converting process as the
system counts it, pages of mapped files included. Reading the ratio needs several pairs: disks of shared machines are
noisy. It takes twice the model's bytes on the disk.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixtrain.tool import counted  # noqa: E402

BLOCK = 1 << 26  # bytes
SHOWN = "{what:<18}  {layers:>6} {gb:6.1f}  {pair:>4}  {seconds:7.1f}  {cp_seconds:7.1f}  {ratio:5.2f}  {peak_gb:7.2f}"
COLUMNS = ["what", "layers", "gb", "pair", "seconds", "cp_seconds", "ratio", "peak_gb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=counted, nargs="+", default=[3, 8], metavar="N", help="each has 2.9 GB")
    parser.add_argument("--pairs", type=counted, default=3, metavar="N")
    parser.add_argument("--folder", default=".", help="where to write: the disk to measure")
    parser.add_argument("--csv", type=Path, help="write the pairs there")
    given = parser.parse_args()
    rows = []
    print("what                layers     GB  pair        s     cp s  ratio  peak GB")
    with tempfile.TemporaryDirectory(prefix="bench_convert-", dir=given.folder) as folder:
        for layers in given.layers:
            for row in measured(Path(folder), layers, given.pairs):
                rows.append(row)
                print(SHOWN.format(**row), flush=True)
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        median, peak = statistics.median(row["ratio"] for row in mine), max(row["peak_gb"] for row in mine)
        print(f"{what}: median ratio {median:.2f}, peak {peak:.2f} GB")
    if given.csv:
        with open(given.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
                             for row in rows)  # fmt: skip


def measured(folder: Path, layers: int, pairs: int):
    """The rows of a model of so many layers, each when it is known."""
    there, megatron, copy, back = (folder / name for name in ("there", "megatron", "copy", "back"))
    size = random_model(there, layers) / 1e9
    for pair in range(1, pairs + 1):
        for what, tool, source, target in (
            ("hf to megatron", "convert_hf_to_megatron", there, megatron),
            ("megatron to hf", "convert_megatron_to_hf", megatron, back),
        ):
            shutil.rmtree(copy, ignore_errors=True)
            cp, _ = timed(["cp", "-r", str(source), str(copy)])
            shutil.rmtree(copy)
            seconds, peak = timed([sys.executable, f"{Path(__file__).parent}/{tool}.py", str(source), str(target)])
            yield dict(zip(COLUMNS, (what, layers, size, pair, seconds, cp, seconds / cp, peak), strict=True))
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    shutil.rmtree(there)


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds until what it wrote is on the disk, peak resident GB of the process)."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def random_model(folder: Path, layers: int) -> int:
    """Write a Mixtral 8x7B of so many layers, of random bits; its bytes."""
    import torch

    from mixtrain.convert import origin, runs, settings, to_hf
    from mixtrain.facts import published

    folder.mkdir()
    facts = published()["mistralai/Mixtral-8x7B-v0.1"] | {"model.num_layers": layers}
    config = origin.configuration(facts)
    whole = to_hf.Origin(None, runs.index(config, "hub"), torch.bfloat16)
    shards, noise = to_hf.shards_of(folder, whole, 5 * 10**9), os.urandom(BLOCK)
    for shard in shards:
        with open(shard.path, "wb") as file:
            file.write(to_hf.header(shard, whole))
            for start in range(0, shard.size, BLOCK):
                file.write(noise[: min(BLOCK, shard.size - start)])
    if len(shards) > 1:
        to_hf.write_weight_map(folder / to_hf.INDEX, shards, whole)
    (folder / to_hf.CONFIG).write_text(json.dumps(settings.to_hugging_face(config)))
    return sum(shard.size for shard in shards)


if __name__ == "__main__":
    main()
