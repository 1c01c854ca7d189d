"""Scenarios of the fault drill: signals, dead and hanging ranks, bad steps, and the list of all.

Each docstring states what is expected, and is printed.

Rule: a scenario checks what a user sees: exit codes, output, status.json, checkpoints, and the
metrics, which are compared with those of an undisturbed run.
"""

from __future__ import annotations

import json
import shutil
import signal
import time

from mixtrain.errors import FAULT, FINISHED, REFUSED
from mixtrain.proof.drill import checkpoints
from mixtrain.proof.drill.arena import SHORT, Arena, Outcome
from mixtrain.proof.drill.runs import DrillRun, newest_step, records, wait
from mixtrain.system.status import read_status


def stopped_by(arena: Arena, number: int) -> Outcome:
    run = arena.disturb(None, number)
    status = read_status(arena.run_dir)
    saved = newest_step(arena.run_dir) == status["step"]
    resumed = arena.resume()
    ok = (
        run.code == FINISHED
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
    run = arena.disturb(1, signal.SIGTERM)
    resumed = arena.resume()
    return Outcome(
        run.code == FINISHED and resumed.ok, f"exit {run.code}; resumed: {resumed.message}", 0
    )


def preempted(arena: Arena) -> Outcome:
    """SIGTERM, SIGKILL 5 s later: saved within the grace period; resumes with the same metrics"""
    run = arena.disturb(None, signal.SIGTERM, seconds=5)
    resumed = arena.resume()
    return Outcome(
        resumed.ok and run.code == FINISHED,
        f"exit {run.code} after {run.seconds:.1f} s; resumed: {resumed.message}",
        0,
    )


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
    run = arena.disturb(1, signal.SIGKILL)
    reason = read_status(arena.run_dir)["reason"]
    resumed = arena.resume()
    ok = (
        run.code == FAULT
        and reason.startswith("rank 1 was ended by SIGKILL in step")
        and run.seconds < 30
    )
    return Outcome(
        ok and resumed.ok,
        f"exit {run.code} after {run.seconds:.0f} s: {reason}; resumed: {resumed.message}",
        7 - 5,
    )


def stopped_rank(arena: Arena) -> Outcome:
    """A rank hangs: its step and all stacks are printed, exit 1 in time; same metrics on resume"""
    run = arena.disturb(1, signal.SIGSTOP, seconds=90)
    reason = read_status(arena.run_dir)["reason"]
    stacks = run.text().count("innermost first")
    resumed = arena.resume()
    ok = (
        run.code == FAULT
        and reason.startswith("rank 1 did not answer in step")
        and stacks == 2
        and run.seconds < 60
    )
    return Outcome(
        ok and resumed.ok,
        f"exit {run.code} after {run.seconds:.0f} s: {reason[:60]}; {stacks} stacks;"
        f" {resumed.message}",
        2,
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
    resumed = arena.resume()
    return Outcome(resumed.ok and has_lock_file, resumed.message, 2)


def crash_loop(arena: Arena) -> Outcome:
    """The same crash repeatedly: a diagnosis after three attempts, exit 2"""
    overrides = [SHORT, "checkpoint.max_attempts=3", "checkpoint.save_interval=100"]
    arena.finish("trainer.max_steps=5")
    codes = []
    for _ in range(4):
        run = arena.finish(*overrides, fault="nan_router")
        codes.append(run.code)
    diagnosed = (
        "3 runs in a row started at step 5" in run.text()
        and "lm_loss is not finite on rank 1" in run.text()
    )
    return Outcome(
        codes == [FAULT] * 3 + [REFUSED] and diagnosed,
        f"exits {codes}, {'diagnosis' if diagnosed else 'NO diagnosis'}",
    )


def nan_loss(arena: Arena) -> Outcome:
    """NaN loss on one rank: all stop; step, rank, layer, samples recorded; resumes, same metrics"""
    run = arena.finish(SHORT, fault="nan_router")
    reason = read_status(arena.run_dir)["reason"]
    record = json.loads((arena.run_dir / "bad_steps.jsonl").read_text().splitlines()[0])
    ok = (
        run.code == FAULT
        and "step 8: lm_loss is not finite on rank 1; the router of layer 2 on rank 1" in reason
    )
    resumed = arena.resume()
    return Outcome(
        ok and len(record["samples"]) == 4 and resumed.ok,
        f"exit {run.code}: {reason[:70]}; {resumed.message}",
        2,
    )


def huge_gradient(arena: Arena) -> Outcome:
    """A gradient that is far too large: the step is skipped and counted, the run continues"""
    overrides = [SHORT, "trainer.bad_step_policy=skip", "trainer.bad_step_grad_norm=1000"]
    run = arena.finish(*overrides, fault="huge_gradient")
    counts = [record["skipped_steps"] for record in records(arena.run_dir)]
    ok = run.code == FINISHED and counts == [0] * 7 + [1] * 13
    return Outcome(ok, f"exit {run.code}, {counts[-1] if counts else '?'} step skipped")


def one_expert(arena: Arena) -> Outcome:
    """Every token goes to the same two experts: no crash, no hang, a warning with the load"""
    run = arena.finish(SHORT, fault="collapse")
    warned = "sends 100% of its tokens to experts 0, 1: 128 128 0 0 0 0 0 0" in run.text()
    return Outcome(
        run.code == FINISHED and warned, f"exit {run.code}, {'warned' if warned else 'NOT WARNED'}"
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


SCENARIOS = [
    sigterm, sigusr1, sigint, sigterm_to_one_rank, preempted, sigkill_at_random,
    sigkill_in_a_save, killed_rank, stopped_rank, checkpoints.truncated_shard,
    checkpoints.flipped_byte, checkpoints.missing_shard, checkpoints.missing_metadata,
    checkpoints.garbage_pointer, checkpoints.nothing_valid, checkpoints.full_disk,
    checkpoints.dead_writer, checkpoints.async_saves, two_jobs, lock_left_behind, crash_loop,
    checkpoints.other_layout, checkpoints.other_architecture, checkpoints.other_batch,
    checkpoints.other_data, nan_loss, huge_gradient, one_expert, deterministic,
]  # fmt: skip
