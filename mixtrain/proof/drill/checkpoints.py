"""Scenarios of the fault drill: damaged and interrupted checkpoints, and other configurations.

Each docstring states what is expected, and is printed.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from mixtrain.checkpoint import directory, integrity
from mixtrain.errors import FAULT, FINISHED, REFUSED
from mixtrain.proof.drill.arena import SHORT, Arena, Outcome
from mixtrain.proof.drill.runs import DrillRun, newest_step, records, wait
from mixtrain.system.status import read_status


def resume_from_damaged(
    arena: Arena, damage: Callable[[Path], object], expected_text: str
) -> Outcome:
    """Train to step 15, damage the newest checkpoint, resume to step 20."""
    arena.finish("trainer.max_steps=15")
    damage(directory.path_of(arena.run_dir, 15))
    run = arena.finish(SHORT)
    resumed = arena.check_resumed(run)
    named = expected_text in run.text() and "after 10 steps" in run.text()
    return Outcome(
        resumed.ok and named,
        f"{'named, resumed from step 10' if named else 'NOT NAMED'}; {resumed.message}",
        5,
    )


def shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def truncated_shard(arena: Arena) -> Outcome:
    """A truncated shard: reported, the checkpoint before is used"""
    return resume_from_damaged(
        arena, lambda path: os.truncate(shard(path), 5000), "has 5,000 bytes"
    )


def flipped_byte(arena: Arena) -> Outcome:
    """A flipped byte: reported, the checkpoint before is used"""
    return resume_from_damaged(arena, lambda path: flip(shard(path)), "SHA-256")


def missing_shard(arena: Arena) -> Outcome:
    """A missing shard: reported, the checkpoint before is used"""
    return resume_from_damaged(arena, lambda path: shard(path).unlink(), ".distcp is missing")


def missing_metadata(arena: Arena) -> Outcome:
    """A missing .metadata: reported, the checkpoint before is used"""
    return resume_from_damaged(
        arena, lambda path: (path / ".metadata").unlink(), ".metadata is missing"
    )


def garbage_pointer(arena: Arena) -> Outcome:
    """Garbage in the tracker file: reported, and the newest checkpoint is found anyway"""
    arena.finish("trainer.max_steps=15")
    (arena.run_dir / directory.TRACKER).write_text("\0rubbish")
    run = arena.finish(SHORT)
    resumed = arena.check_resumed(run)
    return Outcome(
        resumed.ok and "after 15 steps" in run.text() and "names no checkpoint" in run.text(),
        resumed.message,
        0,
    )


def nothing_valid(arena: Arena) -> Outcome:
    """Every checkpoint damaged: exit 2, each is named, no start from random weights"""
    arena.finish("trainer.max_steps=10", "checkpoint.keep_last=1")
    flip(shard(directory.path_of(arena.run_dir, 10)))
    before = (arena.run_dir / "metrics.jsonl").read_text()
    run = arena.finish(SHORT)
    ok = (
        run.code == REFUSED
        and "holds no valid checkpoint" in run.text()
        and "Traceback" not in run.text()
    )
    unchanged = (arena.run_dir / "metrics.jsonl").read_text() == before
    return Outcome(ok and unchanged, f"exit {run.code}, metrics {'kept' if unchanged else 'LOST'}")


def full_disk(arena: Arena) -> Outcome:
    """A full disk during a save: bytes needed and free are printed, the old save stays; resumes"""
    overrides = [SHORT, "checkpoint.keep_last=1"]
    with DrillRun(arena.run_dir.parent / "warm", SHORT, "checkpoint=none") as run:
        run.wait()  # builds the data index, so that the limit below meets only the save
    arena.finish("trainer.max_steps=10", *overrides[1:])
    size = max(path.stat().st_size for path in directory.path_of(arena.run_dir, 10).iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the run inherits the limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        run = arena.finish(*overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reported = "are free; iter_0000010 is whole" in read_status(arena.run_dir)["reason"]
    is_valid = integrity.problem(directory.path_of(arena.run_dir, 10), full=True) == ""
    resumed = arena.resume(*overrides)
    ok = run.code == FAULT and reported and is_valid
    return Outcome(
        ok and resumed.ok,
        f"exit {run.code}, {'both numbers reported' if reported else 'NOT REPORTED'};"
        f" {resumed.message}",
        5,
    )


def kill_all(children: Path) -> bool:
    """Kill the processes that a rank has forked; return whether there were any."""
    pids = children.read_text().split() if children.exists() else []
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    return bool(pids)


def dead_writer(arena: Arena) -> Outcome:
    """The writer of an async save dies: exit 1; resumes from the save before, same metrics"""
    # many saves, of a few milliseconds each
    overrides = [SHORT, "checkpoint.async_save=true", "checkpoint.save_interval=1"]
    with arena.run(*overrides) as run:
        run.wait_for_step(6)
        children = Path("/proc/{0}/task/{0}/children".format(run.ranks()[1]))
        wait(lambda: run.ended() or kill_all(children), 60, pause=0)
        code = run.wait(60)
    reason = read_status(arena.run_dir)["reason"]
    step = run.step()
    saved = newest_step(arena.run_dir)
    resumed = arena.resume(*overrides)
    ok = code == FAULT and "the writer of rank 1 was ended by SIGKILL" in reason
    return Outcome(
        ok and resumed.ok, f"exit {code}: {reason[:90]}; {resumed.message}", step - saved
    )


def async_saves(arena: Arena) -> Outcome:
    """An async save every step: the saves are in order and valid at the end"""
    run = arena.finish(SHORT, "checkpoint.async_save=true", "checkpoint.save_interval=1")
    names = [
        line.split()[1].rstrip(":")
        for line in run.text().splitlines()
        if line.startswith("saved iter_")
    ]
    ordered = names == [f"iter_{step:07d}" for step in range(1, 21)]
    are_valid = all(
        not integrity.problem(directory.path_of(arena.run_dir, at), True)
        for at in directory.steps_in(arena.run_dir)
    )
    return Outcome(
        run.code == FINISHED and ordered and are_valid and arena.has_reference_metrics(20),
        f"{len(names)} saves, valid: {are_valid}",
        0,
    )


def other_layout(arena: Arena) -> Outcome:
    """Saved at EP2, resumed on one rank, then at EP4: losses of the reference within 1e-5"""
    arena.finish("trainer.max_steps=10")
    at_ep1 = arena.finish("trainer.max_steps=15", "parallel.expert_model_parallel_size=1")
    at_ep4 = arena.finish(SHORT, "parallel.expert_model_parallel_size=4")
    pairs = zip(records(arena.run_dir), records(arena.reference), strict=False)
    worst = max(abs(a["lm_loss"] / b["lm_loss"] - 1) for a, b in pairs)
    digests = [record["sample_digest"] for record in records(arena.run_dir)]
    expected_digests = [record["sample_digest"] for record in records(arena.reference)[:20]]
    same_samples = digests == expected_digests
    ok = (
        at_ep1.code == at_ep4.code == FINISHED
        and worst < 1e-5
        and same_samples
        and len(records(arena.run_dir)) == 20
    )
    return Outcome(
        ok,
        f"exits {at_ep1.code}, {at_ep4.code}; losses within {worst:.0e}, the same samples:"
        f" {same_samples}",
        0,
    )


def other_architecture(arena: Arena) -> Outcome:
    """Resumed as another model: exit 2 with the names and shapes that differ, nothing changed"""
    arena.finish("trainer.max_steps=10")
    run = arena.finish(SHORT, "model.moe_ffn_hidden_size=96")
    named = "weight is [2, 8, 128, 64] there, [2, 8, 192, 64] here" in run.text()
    resumed = arena.resume()
    return Outcome(
        run.code == REFUSED and named and resumed.ok,
        f"exit {run.code}; afterwards: {resumed.message}",
        0,
    )


def other_batch(arena: Arena) -> Outcome:
    """Resumed with twice the batch size: the next samples in the same order"""
    arena.finish("trainer.max_steps=10")
    run = arena.finish("trainer.max_steps=15", "trainer.global_batch_size=8")
    consumed = [record["consumed_samples"] for record in records(arena.run_dir)]
    ok = run.code == FINISHED and consumed == [*range(4, 44, 4), *range(48, 88, 8)]
    return Outcome(
        ok and "global_batch_size = 8 (was 4)" in run.text(),
        f"exit {run.code}, {consumed[-1]} samples read",
        0,
    )


def other_data(arena: Arena) -> Outcome:
    """Resumed with other data: exit 2, the change is reported"""
    arena.finish("trainer.max_steps=10")
    run = arena.finish(SHORT, "data.seq_length=16")
    ok = run.code == REFUSED and "was trained on other data" in run.text()
    return Outcome(ok, f"exit {run.code}")
