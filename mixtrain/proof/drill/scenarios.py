"""The scenarios of the drill: what is done to a run, and what must be left. The docstring says what is expected.

Rule: a scenario looks at what a user would look at: exit codes, what was printed, status.json, the checkpoints, and the
metrics beside those of a run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mixtrain.checkpoint import directory, integrity
from mixtrain.errors import FAULT, FINISHED, REFUSED
from mixtrain.proof.drill.runs import Run, newest_step, records, wait
from mixtrain.system.status import read_status

LENGTH = 320  # steps of the run that nothing happens to: as long as any scenario needs
SHORT = "trainer.max_steps=20"
KILLS = 20


class Seen(NamedTuple):
    """What came of a scenario; `lost` is the most steps that had to be done again, where there was any to lose."""

    ok: bool
    words: str
    lost: int | None = None


class Arena:
    """Where a scenario happens: a folder, the reference, and random numbers that can be had again."""

    def __init__(self, folder: Path, reference: Path, seed: int, kills: int):
        self.run_dir = folder / "run"
        self.reference = reference
        self.kills = kills
        self.random = random.Random(seed)

    def run(self, *words: str, fault: str = "") -> Run:
        return Run(self.run_dir, *words, fault=fault)

    def finish(self, *words: str) -> Run:
        """Run to the end, from whatever is there."""
        with self.run(*words) as run:
            run.code = run.wait(180)
        return run

    def same(self, steps: int) -> bool:
        """Whether the metrics of the first steps are those of the reference, to the last bit."""
        here = [record for record in records(self.run_dir) if "lm_loss" in record]
        return len(here) == steps and here == records(self.reference)[:steps]

    def resumed(self, run: Run) -> Seen:
        """The verdict on a run that went on to step 20 and should be as if nothing had happened."""
        same = self.same(20)
        words = f"exit {run.code}, {'metrics identical' if same else 'metrics DIFFER'}"
        return Seen(run.code == FINISHED and same, words)


def reference(folder: Path) -> Path:
    """Train the run that nothing happens to."""
    with Run(folder / "run", f"trainer.max_steps={LENGTH}", "checkpoint=none") as run:
        if run.wait(600) != FINISHED:
            raise RuntimeError(f"the reference run failed:\n{run.text()[-2000:]}")
    return folder / "run"


def stopped_by(arena: Arena, number: int, who: int | None = None) -> Seen:
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(who, number)
        code = run.wait(60)
    status = read_status(arena.run_dir)
    saved = newest_step(arena.run_dir) == status["step"]
    again = arena.resumed(arena.finish(SHORT))
    ok = (
        code == FINISHED
        and status["state"] == "stopped"
        and signal.Signals(number).name in status["reason"]
        and saved
    )
    return Seen(
        ok and again.ok,
        f"{status['state']} in step {status['step']}, saved; resumed: {again.words}",
        0,
    )


def sigterm(arena: Arena) -> Seen:
    """SIGTERM: the step ends, is saved, exit 0; resumed, nothing differs"""
    return stopped_by(arena, signal.SIGTERM)


def sigusr1(arena: Arena) -> Seen:
    """SIGUSR1 (Slurm's warning): as SIGTERM"""
    return stopped_by(arena, signal.SIGUSR1)


def sigint(arena: Arena) -> Seen:
    """Ctrl-C: as SIGTERM"""
    return stopped_by(arena, signal.SIGINT)


def sigterm_to_one_rank(arena: Arena) -> Seen:
    """SIGTERM to one rank alone: all stop after the same step; resumed, nothing differs"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(1, signal.SIGTERM)
        code = run.wait(60)
    again = arena.resumed(arena.finish(SHORT))
    return Seen(code == FINISHED and again.ok, f"exit {code}; resumed: {again.words}", 0)


def killed(arena: Arena, run: Run, in_save: bool) -> tuple[int, int]:
    """Kill a rank or the launcher at a random moment: (the step that was reached, that of the newest checkpoint)."""
    start = newest_step(arena.run_dir)
    if in_save:
        run.wait_for_a_save()
        time.sleep(arena.random.uniform(0, 0.02))
    else:
        run.wait_for_step(start + arena.random.randint(1, 14))
        time.sleep(arena.random.uniform(0, 0.06))
    run.kill(arena.random.choice([None, 0, 1]))
    run.wait(60)
    wait(lambda: not run.ranks(), 30)
    return run.step(), newest_step(arena.run_dir)


def sigkill_at_random(arena: Arena) -> Seen:
    """SIGKILL at random moments of training and of saves: each time it goes on from the newest save; nothing differs"""
    words = [f"trainer.max_steps={15 * arena.kills + 20}", "checkpoint.max_attempts=null"]
    lost = []
    start = 0
    for number in range(arena.kills):
        with arena.run(*words) as run:
            step, saved = killed(arena, run, in_save=number % 2 == 1)
            if start and f"after {start} steps" not in run.text():
                return Seen(False, f"life {number + 1} did not go on from step {start}")
        lost.append(step - saved)
        start = saved
    run = arena.finish(*words)
    same = arena.same(15 * arena.kills + 20)
    ok = run.code == FINISHED and same and max(lost) <= 5
    return Seen(
        ok,
        f"{arena.kills} kills, exit {run.code}, {'metrics identical' if same else 'DIFFER'}",
        max(lost),
    )


def sigkill_in_a_save(arena: Arena) -> Seen:
    """SIGKILL during a save: the one before is the target, what was half written is removed"""
    with arena.run(SHORT) as run:
        run.wait_for_step(6)
        run.wait_for_a_save()
        run.kill(0)
        run.wait(60)
    half = [path.name for path in arena.run_dir.glob("iter_*.saving")]
    step = run.step()
    saved = newest_step(arena.run_dir)
    again = arena.finish(SHORT)
    gone = not list(arena.run_dir.glob("iter_*.saving"))
    seen = arena.resumed(again)
    return Seen(
        seen.ok and gone and saved > 0,
        f"left {', '.join(half) or 'nothing'}; resumed: {seen.words}",
        step - saved,
    )


def killed_rank(arena: Arena) -> Seen:
    """One rank dies: the others stop, exit 1, one line names rank and step; resumed, nothing differs"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(1)
        started = time.monotonic()
        code = run.wait(60)
    seconds = time.monotonic() - started
    reason = read_status(arena.run_dir)["reason"]
    seen = arena.resumed(arena.finish(SHORT))
    ok = code == FAULT and reason.startswith("rank 1 was ended by SIGKILL in step") and seconds < 30
    return Seen(
        ok and seen.ok, f"exit {code} after {seconds:.0f} s: {reason}; resumed: {seen.words}", 7 - 5
    )


def stopped_rank(arena: Arena) -> Seen:
    """A rank hangs: named with its step and all stacks, exit 1 within the timeout; resumed, nothing differs"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(1, signal.SIGSTOP)
        started = time.monotonic()
        code = run.wait(90)
    seconds = time.monotonic() - started
    reason = read_status(arena.run_dir)["reason"]
    stacks = run.text().count("innermost first")
    seen = arena.resumed(arena.finish(SHORT))
    ok = (
        code == FAULT
        and reason.startswith("rank 1 did not answer in step")
        and stacks == 2
        and seconds < 60
    )
    return Seen(
        ok and seen.ok,
        f"exit {code} after {seconds:.0f} s: {reason[:60]}; {stacks} stacks; {seen.words}",
        2,
    )


def damaged(arena: Arena, damage: Callable[[Path], object], word: str) -> Seen:
    """Train to step 15, damage the newest checkpoint, go on to 20."""
    arena.finish("trainer.max_steps=15")
    damage(directory.path_of(arena.run_dir, 15))
    run = arena.finish(SHORT)
    seen = arena.resumed(run)
    named = word in run.text() and "after 10 steps" in run.text()
    return Seen(
        seen.ok and named,
        f"{'named, went on from step 10' if named else 'NOT NAMED'}; {seen.words}",
        5,
    )


def shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def truncated_shard(arena: Arena) -> Seen:
    """A shard cut short: named, the checkpoint before is taken"""
    return damaged(arena, lambda path: os.truncate(shard(path), 5000), "has 5,000 bytes")


def flipped_byte(arena: Arena) -> Seen:
    """A flipped byte: named, the checkpoint before is taken"""
    return damaged(arena, lambda path: flip(shard(path)), "SHA-256")


def missing_shard(arena: Arena) -> Seen:
    """A missing shard: named, the checkpoint before is taken"""
    return damaged(arena, lambda path: shard(path).unlink(), ".distcp is missing")


def missing_metadata(arena: Arena) -> Seen:
    """A missing .metadata: named, the checkpoint before is taken"""
    return damaged(arena, lambda path: (path / ".metadata").unlink(), ".metadata is missing")


def garbage_pointer(arena: Arena) -> Seen:
    """Garbage in the pointer: said, and the newest is found all the same"""
    arena.finish("trainer.max_steps=15")
    (arena.run_dir / directory.TRACKER).write_text("\0rubbish")
    run = arena.finish(SHORT)
    seen = arena.resumed(run)
    return Seen(
        seen.ok and "after 15 steps" in run.text() and "names no checkpoint" in run.text(),
        seen.words,
        0,
    )


def nothing_valid(arena: Arena) -> Seen:
    """Every checkpoint damaged: exit 2, each is named, nothing starts from random weights"""
    arena.finish("trainer.max_steps=10", "checkpoint.keep_last=1")
    flip(shard(directory.path_of(arena.run_dir, 10)))
    before = (arena.run_dir / "metrics.jsonl").read_text()
    run = arena.finish(SHORT)
    ok = (
        run.code == REFUSED
        and "holds no valid checkpoint" in run.text()
        and "Traceback" not in run.text()
    )
    kept = (arena.run_dir / "metrics.jsonl").read_text() == before
    return Seen(ok and kept, f"exit {run.code}, metrics {'kept' if kept else 'LOST'}")


def full_disk(arena: Arena) -> Seen:
    """The disk fills during a save: bytes needed and free are said, the old checkpoint stays; with room it goes on"""
    words = [SHORT, "checkpoint.keep_last=1"]
    with Run(arena.run_dir.parent / "warm", SHORT, "checkpoint=none") as run:
        run.wait()  # leaves the index of the data, which must not be what the limit meets
    arena.finish("trainer.max_steps=10", *words[1:])
    size = max(path.stat().st_size for path in directory.path_of(arena.run_dir, 10).iterdir())
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the run's, which inherits it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        run = arena.finish(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = "are free; iter_0000010 is complete" in read_status(arena.run_dir)["reason"]
    whole = integrity.problem(directory.path_of(arena.run_dir, 10), full=True) == ""
    seen = arena.resumed(arena.finish(*words))
    ok = run.code == FAULT and said and whole
    return Seen(
        ok and seen.ok,
        f"exit {run.code}, {'both numbers said' if said else 'NOT SAID'}; {seen.words}",
        5,
    )


def kill_all(children: Path) -> bool:
    """Kill the processes that a rank has forked; whether there were any."""
    found = children.read_text().split() if children.exists() else []
    for child in found:
        os.kill(int(child), signal.SIGKILL)
    return bool(found)


def dead_writer(arena: Arena) -> Seen:
    """A process that writes an async save dies: an error soon; resumed from the save before, nothing differs"""
    # many, each of a few milliseconds
    words = [SHORT, "checkpoint.async_save=true", "checkpoint.save_interval=1"]
    with arena.run(*words) as run:
        run.wait_for_step(6)
        children = Path("/proc/{0}/task/{0}/children".format(run.ranks()[1]))
        wait(lambda: run.ended() or kill_all(children), 60, pause=0)
        code = run.wait(60)
    reason = read_status(arena.run_dir)["reason"]
    step = run.step()
    saved = newest_step(arena.run_dir)
    seen = arena.resumed(arena.finish(*words))
    ok = code == FAULT and "the writer of rank 1 was ended by SIGKILL" in reason
    return Seen(ok and seen.ok, f"exit {code}: {reason[:90]}; {seen.words}", step - saved)


def async_saves(arena: Arena) -> Seen:
    """A save a step, written beside training: in order, the last one whole at the end"""
    words = [SHORT, "checkpoint.async_save=true", "checkpoint.save_interval=1"]
    run = arena.finish(*words)
    names = [
        line.split()[1].rstrip(":")
        for line in run.text().splitlines()
        if line.startswith("saved iter_")
    ]
    ordered = names == [f"iter_{step:07d}" for step in range(1, 21)]
    whole = all(
        not integrity.problem(directory.path_of(arena.run_dir, at), True)
        for at in directory.steps_in(arena.run_dir)
    )
    return Seen(
        run.code == FINISHED and ordered and whole and arena.same(20),
        f"{len(names)} saves, whole: {whole}",
        0,
    )


def two_jobs(arena: Arena) -> Seen:
    """A second job on the directory: exit 2, the first is not disturbed"""
    with arena.run(SHORT) as first:
        first.wait_for_step(3)
        second = arena.finish(SHORT)
        code = first.wait(60)
    ok = (
        second.code == REFUSED
        and "is in use by process" in second.text()
        and code == FINISHED
        and arena.same(20)
    )
    return Seen(ok, f"exit {second.code} and {code}")


def lock_left_behind(arena: Arena) -> Seen:
    """A launcher killed outright: its ranks end, its lock is not in the way"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(None)
        run.wait(30)
        wait(lambda: not run.ranks(), 20)
        there = (arena.run_dir / ".lock").exists()
    seen = arena.resumed(arena.finish(SHORT))
    return Seen(seen.ok and there, seen.words, 2)


def crash_loop(arena: Arena) -> Seen:
    """The same crash again and again: after three tries a diagnosis, exit 2"""
    words = [SHORT, "checkpoint.max_attempts=3", "checkpoint.save_interval=100"]
    arena.finish("trainer.max_steps=5")
    codes = []
    for _ in range(4):
        with arena.run(*words, fault="nan_router") as run:
            codes.append(run.wait(90))
    said = (
        "3 runs in a row started at step 5" in run.text()
        and "lm_loss is not finite on rank 1" in run.text()
    )
    return Seen(
        codes == [FAULT] * 3 + [REFUSED] and said,
        f"exits {codes}, {'diagnosis' if said else 'NO diagnosis'}",
    )


def other_layout(arena: Arena) -> Seen:
    """Saved at EP2, resumed on one rank and then at EP4: the losses of an uninterrupted run to 1e-5"""
    arena.finish("trainer.max_steps=10")
    one = arena.finish("trainer.max_steps=15", "parallel.expert_model_parallel_size=1")
    four = arena.finish(SHORT, "parallel.expert_model_parallel_size=4")
    pairs = zip(records(arena.run_dir), records(arena.reference), strict=False)
    worst = max(abs(a["lm_loss"] / b["lm_loss"] - 1) for a, b in pairs)
    read = [a["sample_digest"] for a in records(arena.run_dir)] == [
        b["sample_digest"] for b in records(arena.reference)[:20]
    ]
    ok = (
        one.code == four.code == FINISHED
        and worst < 1e-5
        and read
        and len(records(arena.run_dir)) == 20
    )
    return Seen(
        ok, f"exits {one.code}, {four.code}; losses within {worst:.0e}, the same samples: {read}", 0
    )


def other_architecture(arena: Arena) -> Seen:
    """Resumed as another model: exit 2 with the names and shapes that differ, nothing touched"""
    arena.finish("trainer.max_steps=10")
    run = arena.finish(SHORT, "model.moe_ffn_hidden_size=96")
    named = "weight is [2, 8, 128, 64] there, [2, 8, 192, 64] here" in run.text()
    seen = arena.resumed(arena.finish(SHORT))
    return Seen(
        run.code == REFUSED and named and seen.ok, f"exit {run.code}; afterwards: {seen.words}", 0
    )


def other_batch(arena: Arena) -> Seen:
    """Resumed with twice the batch: the next samples in the same order"""
    arena.finish("trainer.max_steps=10")
    run = arena.finish("trainer.max_steps=15", "trainer.global_batch_size=8")
    consumed = [record["consumed_samples"] for record in records(arena.run_dir)]
    ok = run.code == FINISHED and consumed == [*range(4, 44, 4), *range(48, 88, 8)]
    return Seen(
        ok and "global_batch_size = 8 (was 4)" in run.text(),
        f"exit {run.code}, {consumed[-1]} samples read",
        0,
    )


def other_data(arena: Arena) -> Seen:
    """Resumed with other data: exit 2, said what changed"""
    arena.finish("trainer.max_steps=10")
    run = arena.finish(SHORT, "data.seq_length=16")
    ok = run.code == REFUSED and "was trained on other data" in run.text()
    return Seen(ok, f"exit {run.code}")


def nan_loss(arena: Arena) -> Seen:
    """A loss that is no number on one rank: all stop, step, rank, layer and samples are recorded; resumed, as before"""
    with arena.run(SHORT, fault="nan_router") as run:
        code = run.wait(90)
    reason = read_status(arena.run_dir)["reason"]
    record = json.loads((arena.run_dir / "bad_steps.jsonl").read_text().splitlines()[0])
    ok = (
        code == FAULT
        and "step 8: lm_loss is not finite on rank 1; the router of layer 2 on rank 1" in reason
    )
    seen = arena.resumed(arena.finish(SHORT))
    return Seen(
        ok and len(record["samples"]) == 4 and seen.ok,
        f"exit {code}: {reason[:70]}; {seen.words}",
        2,
    )


def huge_gradient(arena: Arena) -> Seen:
    """A gradient far too large: the step is skipped and counted, the run goes on"""
    words = [SHORT, "trainer.bad_step_policy=skip", "trainer.bad_step_grad_norm=1000"]
    with arena.run(*words, fault="huge_gradient") as run:
        code = run.wait(90)
    counts = [record["skipped_steps"] for record in records(arena.run_dir)]
    ok = code == FINISHED and counts == [0] * 7 + [1] * 13
    return Seen(ok, f"exit {code}, {counts[-1] if counts else '?'} step skipped")


def one_expert(arena: Arena) -> Seen:
    """Every token to the same two experts: no crash, no hang, a warning with the load"""
    with arena.run(SHORT, fault="collapse") as run:
        code = run.wait(90)
    said = "sends 100% of its tokens to experts 0, 1: 128 128 0 0 0 0 0 0" in run.text()
    return Seen(code == FINISHED and said, f"exit {code}, {'warned' if said else 'NOT WARNED'}")


def deterministic(arena: Arena) -> Seen:
    """trainer.deterministic=true, twice: the same bits"""
    runs = []
    for _ in range(2):
        shutil.rmtree(arena.run_dir, ignore_errors=True)
        runs.append(
            (arena.finish(SHORT, "trainer.deterministic=true").code, records(arena.run_dir))
        )
    return Seen(
        runs[0] == runs[1] and runs[0][0] == FINISHED,
        f"{len(runs[0][1])} steps, the same: {runs[0] == runs[1]}",
    )


def preempted(arena: Arena) -> Seen:
    """SIGTERM and, 5 s later, SIGKILL: saved within the grace; resumed, nothing differs"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(None, signal.SIGTERM)
        started = time.monotonic()
        code = run.wait(5)
        seconds = time.monotonic() - started
    seen = arena.resumed(arena.finish(SHORT))
    return Seen(
        seen.ok and code == FINISHED, f"exit {code} after {seconds:.1f} s; resumed: {seen.words}", 0
    )


SCENARIOS = [
    sigterm, sigusr1, sigint, sigterm_to_one_rank, preempted, sigkill_at_random, sigkill_in_a_save, killed_rank,
    stopped_rank, truncated_shard, flipped_byte, missing_shard, missing_metadata, garbage_pointer, nothing_valid,
    full_disk, dead_writer, async_saves, two_jobs, lock_left_behind, crash_loop, other_layout, other_architecture,
    other_batch, other_data, nan_loss, huge_gradient, one_expert, deterministic,
]  # fmt: skip
