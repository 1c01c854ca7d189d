"""The scenarios of the fault drill. Each docstring states what is expected, and is printed.

Rule: a scenario checks what a user sees: exit codes, output, status.json, checkpoints, and the
metrics, which are compared with those of an undisturbed run.
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
from mixtrain.proof.drill.runs import DrillRun, newest_step, records, wait
from mixtrain.system.status import read_status

REFERENCE_STEPS = 320  # of the undisturbed run: as many as any scenario needs
SHORT = "trainer.max_steps=20"
KILLS = 20


class Outcome(NamedTuple):
    """The result of a scenario; `lost` is the maximum number of repeated steps, if any could be."""

    ok: bool
    message: str
    lost: int | None = None


class Arena:
    """What a scenario works with: a folder, the reference run, and seeded random numbers."""

    def __init__(self, folder: Path, reference: Path, seed: int, kills: int):
        self.run_dir = folder / "run"
        self.reference = reference
        self.kills = kills
        self.random = random.Random(seed)

    def run(self, *overrides: str, fault: str = "") -> DrillRun:
        return DrillRun(self.run_dir, *overrides, fault=fault)

    def finish(self, *overrides: str) -> DrillRun:
        """Run to the end, resuming from what is in the run directory."""
        with self.run(*overrides) as run:
            run.code = run.wait(180)
        return run

    def has_reference_metrics(self, steps: int) -> bool:
        """Whether there are metrics of exactly `steps` steps, bit-identical to the reference's."""
        metrics = [record for record in records(self.run_dir) if "lm_loss" in record]
        return len(metrics) == steps and metrics == records(self.reference)[:steps]

    def check_resumed(self, run: DrillRun) -> Outcome:
        """Check a run that resumed and ended at step 20: its metrics must equal the reference's."""
        is_same = self.has_reference_metrics(20)
        message = f"exit {run.code}, {'metrics identical' if is_same else 'metrics DIFFER'}"
        return Outcome(run.code == FINISHED and is_same, message)


def reference(folder: Path) -> Path:
    """Train the undisturbed run."""
    with DrillRun(folder / "run", f"trainer.max_steps={REFERENCE_STEPS}", "checkpoint=none") as run:
        if run.wait(600) != FINISHED:
            raise RuntimeError(f"the reference run failed:\n{run.text()[-2000:]}")
    return folder / "run"


def stopped_by(arena: Arena, number: int) -> Outcome:
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(None, number)
        code = run.wait(60)
    status = read_status(arena.run_dir)
    saved = newest_step(arena.run_dir) == status["step"]
    resumed = arena.check_resumed(arena.finish(SHORT))
    ok = (
        code == FINISHED
        and status["state"] == "stopped"
        and signal.Signals(number).name in status["reason"]
        and saved
    )
    return Outcome(
        ok and resumed.ok,
        f"{status['state']} in step {status['step']}, saved; resumed: {resumed.message}",
        0,
    )


def sigterm(arena: Arena) -> Outcome:
    """SIGTERM: the step ends and is saved, exit 0; resumes with the same metrics"""
    return stopped_by(arena, signal.SIGTERM)


def sigusr1(arena: Arena) -> Outcome:
    """SIGUSR1 (Slurm's warning): like SIGTERM"""
    return stopped_by(arena, signal.SIGUSR1)


def sigint(arena: Arena) -> Outcome:
    """Ctrl-C: like SIGTERM"""
    return stopped_by(arena, signal.SIGINT)


def sigterm_to_one_rank(arena: Arena) -> Outcome:
    """SIGTERM to one rank: all stop after the same step; resumes with the same metrics"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(1, signal.SIGTERM)
        code = run.wait(60)
    resumed = arena.check_resumed(arena.finish(SHORT))
    return Outcome(code == FINISHED and resumed.ok, f"exit {code}; resumed: {resumed.message}", 0)


def kill_at_random(arena: Arena, run: DrillRun, in_save: bool) -> tuple[int, int]:
    """Kill a rank or the launcher at a random moment; return (last step, newest saved step)."""
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


def sigkill_at_random(arena: Arena) -> Outcome:
    """SIGKILL at random moments, also in saves: resumes from the newest save; same metrics"""
    overrides = [f"trainer.max_steps={15 * arena.kills + 20}", "checkpoint.max_attempts=null"]
    lost = []
    start = 0
    for number in range(arena.kills):
        with arena.run(*overrides) as run:
            step, saved = kill_at_random(arena, run, in_save=number % 2 == 1)
            if start and f"after {start} steps" not in run.text():
                return Outcome(False, f"run {number + 1} did not resume from step {start}")
        lost.append(step - saved)
        start = saved
    run = arena.finish(*overrides)
    is_same = arena.has_reference_metrics(15 * arena.kills + 20)
    ok = run.code == FINISHED and is_same and max(lost) <= 5
    return Outcome(
        ok,
        f"{arena.kills} kills, exit {run.code}, {'metrics identical' if is_same else 'DIFFER'}",
        max(lost),
    )


def sigkill_in_a_save(arena: Arena) -> Outcome:
    """SIGKILL during a save: resumes from the save before; the incomplete one is removed"""
    with arena.run(SHORT) as run:
        run.wait_for_step(6)
        run.wait_for_a_save()
        run.kill(0)
        run.wait(60)
    incomplete = [path.name for path in arena.run_dir.glob("iter_*.saving")]
    step = run.step()
    saved = newest_step(arena.run_dir)
    resumed_run = arena.finish(SHORT)
    is_removed = not list(arena.run_dir.glob("iter_*.saving"))
    resumed = arena.check_resumed(resumed_run)
    return Outcome(
        resumed.ok and is_removed and saved > 0,
        f"left {', '.join(incomplete) or 'nothing'}; resumed: {resumed.message}",
        step - saved,
    )


def killed_rank(arena: Arena) -> Outcome:
    """One rank dies: the others stop, exit 1, a line names rank and step; resumes, same metrics"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(1)
        started = time.monotonic()
        code = run.wait(60)
    seconds = time.monotonic() - started
    reason = read_status(arena.run_dir)["reason"]
    resumed = arena.check_resumed(arena.finish(SHORT))
    ok = code == FAULT and reason.startswith("rank 1 was ended by SIGKILL in step") and seconds < 30
    return Outcome(
        ok and resumed.ok,
        f"exit {code} after {seconds:.0f} s: {reason}; resumed: {resumed.message}",
        7 - 5,
    )


def stopped_rank(arena: Arena) -> Outcome:
    """A rank hangs: its step and all stacks are printed, exit 1 in time; same metrics on resume"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(1, signal.SIGSTOP)
        started = time.monotonic()
        code = run.wait(90)
    seconds = time.monotonic() - started
    reason = read_status(arena.run_dir)["reason"]
    stacks = run.text().count("innermost first")
    resumed = arena.check_resumed(arena.finish(SHORT))
    ok = (
        code == FAULT
        and reason.startswith("rank 1 did not answer in step")
        and stacks == 2
        and seconds < 60
    )
    return Outcome(
        ok and resumed.ok,
        f"exit {code} after {seconds:.0f} s: {reason[:60]}; {stacks} stacks; {resumed.message}",
        2,
    )


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
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the run inherits the limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        run = arena.finish(*overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reported = "are free; iter_0000010 is whole" in read_status(arena.run_dir)["reason"]
    is_valid = integrity.problem(directory.path_of(arena.run_dir, 10), full=True) == ""
    resumed = arena.check_resumed(arena.finish(*overrides))
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
    resumed = arena.check_resumed(arena.finish(*overrides))
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


def two_jobs(arena: Arena) -> Outcome:
    """A second job on the same run directory: exit 2, the first is not disturbed"""
    with arena.run(SHORT) as first:
        first.wait_for_step(3)
        second = arena.finish(SHORT)
        code = first.wait(60)
    ok = (
        second.code == REFUSED
        and "is in use by process" in second.text()
        and code == FINISHED
        and arena.has_reference_metrics(20)
    )
    return Outcome(ok, f"exit {second.code} and {code}")


def lock_left_behind(arena: Arena) -> Outcome:
    """The launcher gets SIGKILL: its ranks end, and its lock file does not block the next run"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(None)
        run.wait(30)
        wait(lambda: not run.ranks(), 20)
        has_lock_file = (arena.run_dir / ".lock").exists()
    resumed = arena.check_resumed(arena.finish(SHORT))
    return Outcome(resumed.ok and has_lock_file, resumed.message, 2)


def crash_loop(arena: Arena) -> Outcome:
    """The same crash repeatedly: a diagnosis after three attempts, exit 2"""
    overrides = [SHORT, "checkpoint.max_attempts=3", "checkpoint.save_interval=100"]
    arena.finish("trainer.max_steps=5")
    codes = []
    for _ in range(4):
        with arena.run(*overrides, fault="nan_router") as run:
            codes.append(run.wait(90))
    diagnosed = (
        "3 runs in a row started at step 5" in run.text()
        and "lm_loss is not finite on rank 1" in run.text()
    )
    return Outcome(
        codes == [FAULT] * 3 + [REFUSED] and diagnosed,
        f"exits {codes}, {'diagnosis' if diagnosed else 'NO diagnosis'}",
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
    resumed = arena.check_resumed(arena.finish(SHORT))
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


def nan_loss(arena: Arena) -> Outcome:
    """NaN loss on one rank: all stop; step, rank, layer, samples recorded; resumes, same metrics"""
    with arena.run(SHORT, fault="nan_router") as run:
        code = run.wait(90)
    reason = read_status(arena.run_dir)["reason"]
    record = json.loads((arena.run_dir / "bad_steps.jsonl").read_text().splitlines()[0])
    ok = (
        code == FAULT
        and "step 8: lm_loss is not finite on rank 1; the router of layer 2 on rank 1" in reason
    )
    resumed = arena.check_resumed(arena.finish(SHORT))
    return Outcome(
        ok and len(record["samples"]) == 4 and resumed.ok,
        f"exit {code}: {reason[:70]}; {resumed.message}",
        2,
    )


def huge_gradient(arena: Arena) -> Outcome:
    """A gradient that is far too large: the step is skipped and counted, the run continues"""
    overrides = [SHORT, "trainer.bad_step_policy=skip", "trainer.bad_step_grad_norm=1000"]
    with arena.run(*overrides, fault="huge_gradient") as run:
        code = run.wait(90)
    counts = [record["skipped_steps"] for record in records(arena.run_dir)]
    ok = code == FINISHED and counts == [0] * 7 + [1] * 13
    return Outcome(ok, f"exit {code}, {counts[-1] if counts else '?'} step skipped")


def one_expert(arena: Arena) -> Outcome:
    """Every token goes to the same two experts: no crash, no hang, a warning with the load"""
    with arena.run(SHORT, fault="collapse") as run:
        code = run.wait(90)
    warned = "sends 100% of its tokens to experts 0, 1: 128 128 0 0 0 0 0 0" in run.text()
    return Outcome(
        code == FINISHED and warned, f"exit {code}, {'warned' if warned else 'NOT WARNED'}"
    )


def deterministic(arena: Arena) -> Outcome:
    """trainer.deterministic=true, twice: bit-identical metrics"""
    runs = []
    for _ in range(2):
        shutil.rmtree(arena.run_dir, ignore_errors=True)
        runs.append(
            (arena.finish(SHORT, "trainer.deterministic=true").code, records(arena.run_dir))
        )
    return Outcome(
        runs[0] == runs[1] and runs[0][0] == FINISHED,
        f"{len(runs[0][1])} steps, the same: {runs[0] == runs[1]}",
    )


def preempted(arena: Arena) -> Outcome:
    """SIGTERM, SIGKILL 5 s later: saved within the grace period; resumes with the same metrics"""
    with arena.run(SHORT) as run:
        run.wait_for_step(7)
        run.kill(None, signal.SIGTERM)
        started = time.monotonic()
        code = run.wait(5)
        seconds = time.monotonic() - started
    resumed = arena.check_resumed(arena.finish(SHORT))
    return Outcome(
        resumed.ok and code == FINISHED,
        f"exit {code} after {seconds:.1f} s; resumed: {resumed.message}",
        0,
    )


SCENARIOS = [
    sigterm, sigusr1, sigint, sigterm_to_one_rank, preempted, sigkill_at_random, sigkill_in_a_save,
    killed_rank, stopped_rank, truncated_shard, flipped_byte, missing_shard, missing_metadata,
    garbage_pointer, nothing_valid, full_disk, dead_writer, async_saves, two_jobs,
    lock_left_behind, crash_loop, other_layout, other_architecture, other_batch, other_data,
    nan_loss, huge_gradient, one_expert, deterministic,
]  # fmt: skip
