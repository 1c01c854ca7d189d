"""How long a checkpoint takes, against writing as many bytes to plain files; how long training waits for an async one.

    python tools/bench_checkpoint.py                        1.1 GB, five pairs, a table
    python tools/bench_checkpoint.py --pairs 9 --csv FILE   and the pairs as CSV

A pair is one save and one writing of the same bytes to as many files, on the same disk, both synced, one right after
the other. Reading the ratio needs several: disks of shared machines are noisy.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixtrain.compose import compose
from mixtrain.config import Config
from mixtrain.plan import Plan, make_plan

# 68 M parameters, of which a checkpoint has 16 bytes each
MODEL = ["model.hidden_size=512", "model.moe_ffn_hidden_size=1024", "model.num_layers=5", "model.num_moe_experts=8"]
RUN = ["data=mock", "parallel=ep1", "data.seq_length=128", "trainer.global_batch_size=4", "trainer.max_steps=1000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", default=".", help="where to write: the disk to measure")
    parser.add_argument("--csv", help="write the pairs there")
    parser.add_argument("overrides", nargs="*", help="words of train.py, to measure another model")
    given = parser.parse_args()
    from mixtrain.forked_ranks import run_ranks  # the first import of torch

    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.folder) as folder:
        plan = plan_of([*MODEL, *RUN, *given.overrides, f"run_dir={folder}/run"])
        (rows, waits) = run_ranks(1, lambda me: measure(plan, me, given.pairs), Path(folder) / "ranks", 3600)[0]
    report(rows, waits, given.csv)


def plan_of(words: list[str]) -> Plan:
    (job,), problems = compose(words)
    return make_plan(Config.from_hydra(job.tree, problems), None, problems)


def measure(plan: Plan, me, pairs: int) -> tuple[list, dict]:
    """[(seconds of a save, of plain writes, bytes)], and seconds of steps and of what async saves hold up."""
    import torch

    from mixtrain import loop, model, optimizer, ranks
    from mixtrain.checkpoint.save import Saver
    from mixtrain.checkpoint.state import RunState
    from mixtrain.parity.measure import batches
    from mixtrain.stop import StopRequest

    torch.set_num_threads(os.cpu_count() or 1)
    run_dir = Path(plan.config.run_dir)
    run_dir.mkdir()
    with ranks.start(plan, me) as here:
        training = optimizer.build(plan, model.build(plan, here.device))

        def step() -> float:
            started = time.perf_counter()
            batch = plan.config.trainer.global_batch_size
            loop.train_step(plan, here, training, [batches(plan)], StopRequest(), 1, batch)
            return time.perf_counter() - started

        step()
        saver, rows = Saver(plan, here, training, lambda _: None), []
        for number in range(1, pairs + 1):
            started = time.perf_counter()
            saver.save(RunState(step=number))
            saved = time.perf_counter() - started
            sizes = [path.stat().st_size for path in (run_dir / f"iter_{number:07d}").iterdir()]
            rows.append((saved, plain_writes(run_dir, sizes), sum(sizes)))
        steps = [step() for _ in range(4)]
        later = replace(plan, config=replace(plan.config, checkpoint=replace(plan.config.checkpoint, async_save=True)))
        saver, holds, during = Saver(later, here, training, lambda _: None), [], []
        for number in range(pairs + 1, 2 * pairs + 1):
            started = time.perf_counter()
            saver.save(RunState(step=number))
            holds.append(time.perf_counter() - started)
            while saver.pending:
                during.append(step())
                started = time.perf_counter()
                saver.poll()
                holds[-1] += time.perf_counter() - started
    return rows, {"step": steps, "held_up": holds, "step_while_writing": during}


def plain_writes(folder: Path, sizes: list[int]) -> float:
    """Seconds to write files of these sizes, two at a time as a rank does, and see them on the disk."""
    data = memoryview(os.urandom(1 << 26))

    def write(number: int) -> None:
        with open(folder / f"plain_{number}", "wb", buffering=0) as file:
            left = sizes[number]
            while left:
                left -= file.write(data[: min(left, len(data))])
            os.fsync(file.fileno())

    started = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(len(sizes))))
    seconds = time.perf_counter() - started
    for number in range(len(sizes)):
        (folder / f"plain_{number}").unlink()
    return seconds


def report(rows: list, waits: dict, to: str | None) -> None:
    print(f"{'pair':>5} {'GB':>6} {'save s':>8} {'plain s':>8} {'ratio':>6}")
    table = [(number, size / 1e9, save, plain, save / plain) for number, (save, plain, size) in enumerate(rows, 1)]
    for number, size, save, plain, ratio in table:
        print(f"{number:>5} {size:>6.2f} {save:>8.2f} {plain:>8.2f} {ratio:>6.2f}")
    print(f"median ratio {statistics.median(row[-1] for row in table):.2f}")
    step, held = (statistics.median(waits[name]) for name in ("step", "held_up"))
    print(f"an async save holds training up for {held:.3f} s, {held / step:.2f} of a step of {step:.3f} s;"
          f" a step while it is written takes {statistics.median(waits['step_while_writing']):.3f} s")  # fmt: skip
    if to:
        with open(to, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["pair", "gigabytes", "save_seconds", "plain_seconds", "ratio"])
            writer.writerows([(number, *(f"{value:.3f}" for value in rest)) for number, *rest in table])


if __name__ == "__main__":
    main()
