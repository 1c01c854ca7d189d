"""Resuming: damage is named and skipped, another run's checkpoint is refused, nothing is lost."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from checkpoints import unequal
from composing import plan_of
from rank_workers import run_ranks
from test_parity import EP
from test_resume import INTERVAL, SHORT, path_of, records, start
from tiny_disks import fill, tiny_disk

from mixtrain.checkpoint import directory, integrity, load, save, shard_writer
from mixtrain.checkpoint.integrity import MANIFEST
from mixtrain.checkpoint.state import state_of
from mixtrain.engine import process_groups
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError
from mixtrain.system.status import read_status

TWO = [EP + "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Run four steps on two ranks, with checkpoints after steps 2 and 4."""
    run_dir, codes, log = start(
        tmp_path_factory.mktemp("trained"), "trainer.max_steps=4", INTERVAL, *TWO
    )
    assert codes == {FINISHED}, log
    return run_dir


def newest(run_dir: Path) -> Path:
    return path_of(run_dir, 4)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# damage -> (how to do it, the step from which the run resumes, the log message)
DAMAGE = {
    "nothing": (lambda run: None, 4, None),
    "truncated": (
        lambda run: os.truncate(newest(run) / "__0_0.distcp", 1000),
        2,
        "__0_0.distcp has 1,000 bytes",
    ),
    "a flipped byte": (
        lambda run: flip(newest(run) / "__1_1.distcp"),
        2,
        "__1_1.distcp is damaged",
    ),
    "a missing shard": (
        lambda run: (newest(run) / "__1_0.distcp").unlink(),
        2,
        "__1_0.distcp is missing",
    ),
    "no .metadata": (lambda run: (newest(run) / ".metadata").unlink(), 2, ".metadata is missing"),
    "no manifest": (lambda run: (newest(run) / MANIFEST).unlink(), 2, "integrity.json is missing"),
    "a bad manifest": (
        lambda run: (newest(run) / MANIFEST).write_text("{"),
        2,
        "integrity.json is damaged",
    ),
    "a nested manifest": (
        lambda run: (newest(run) / MANIFEST).write_text('{"files":' * 100_000),
        2,
        "nested more than",
    ),
    "a bad tracker": (
        lambda run: (run / directory.TRACKER).write_text("\0x"),
        4,
        "names no checkpoint",
    ),
    "no tracker": (lambda run: (run / directory.TRACKER).unlink(), 4, "names no checkpoint"),
    "an old tracker": (lambda run: (run / directory.TRACKER).write_text("2\n"), 4, None),
    "half a save": (
        lambda run: os.rename(newest(run), directory.saving_path(newest(run))),
        2,
        "names no checkpoint",
    ),
    "an empty directory": (
        lambda run: path_of(run, 6).mkdir(),
        4,
        "iter_0000006/integrity.json is missing",
    ),
    "all damaged": (
        lambda run: [flip(path_of(run, at) / "common.pt") for at in (2, 4)],
        None,
        "no valid checkpoint",
    ),
    "no run at all": (lambda run: shutil.rmtree(run), 0, None),
}


@pytest.fixture(scope="module")
def found(trained, tmp_path_factory) -> dict:
    """For each damage: the checkpoint's step that two ranks find, and their log lines."""
    folder = tmp_path_factory.mktemp("found")
    plans = {}
    for number, (name, (damage, *_)) in enumerate(DAMAGE.items()):
        shutil.copytree(trained, folder / f"{number}")
        damage(folder / f"{number}")
        plans[name] = plan_of(*SHORT, *TWO, "trainer.max_steps=4", f"run_dir={folder}/{number}")

    def look(identity) -> dict:
        answers = {}
        with process_groups.start(plans["nothing"], identity) as ranks:
            for name, plan in plans.items():
                lines: list[str] = []
                try:
                    path = load.find_checkpoint(plan, ranks, lines.append)
                    step = state_of(path).step if path else 0
                except UserError as error:
                    step = None
                    lines += error.problems
                answers[name] = [step, lines]
        return answers

    first, second = run_ranks(2, look, folder / "ranks")
    assert {name: step for name, (step, _) in first.items()} == {
        name: step for name, (step, _) in second.items()
    }
    return first


@pytest.mark.parametrize("name", DAMAGE)
def test_the_newest_valid_checkpoint_is_found_and_damage_is_named(name, found):
    _, step, message = DAMAGE[name]
    assert found[name][0] == step
    if message is None:
        assert found[name][1] == []
    else:
        assert message in " ".join(found[name][1])


def start_again(
    trained: Path, folder: Path, *overrides: str, step: int = 2
) -> tuple[Path, set[int], str]:
    """Resume from the checkpoint after `step` in a copy of the run."""
    run_dir = folder / "run"
    shutil.copytree(trained, run_dir)
    for later in [at for at in directory.steps_in(run_dir) if at > step]:
        shutil.rmtree(path_of(run_dir, later))
    return start(folder, *TWO, *overrides)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    flip(newest(tmp_path / "run") / "__0_1.distcp")
    _, codes, log = start(tmp_path, *TWO, "trainer.max_steps=4", INTERVAL)
    assert codes == {FINISHED}, log
    assert "__0_1.distcp is damaged" in log and "resumed from" in log and "after 2 steps" in log
    assert unequal(newest(tmp_path / "run"), newest(trained)) == []
    assert records(tmp_path / "run") == records(trained)


def refused(outcome: tuple[Path, set[int], str], trained: Path) -> str:
    """Return the log of a run refused with exit code 2, no traceback, and no changed file."""
    run_dir, codes, log = outcome
    assert codes == {REFUSED}, log
    assert "Traceback" not in log
    assert (run_dir / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()
    assert (run_dir / "config.yaml").read_text() == (trained / "config.yaml").read_text()
    assert (
        read_status(run_dir)["step"] == 4
        and integrity.problem(path_of(run_dir, 2), full=True) == ""
    )
    return log


def test_another_architecture_is_refused_with_the_names_and_shapes_that_differ(trained, tmp_path):
    overrides = ["trainer.max_steps=4", "model.moe_ffn_hidden_size=64", "model.qk_layernorm=true"]
    log = refused(start_again(trained, tmp_path, *overrides), trained)
    assert (
        "decoder.layers.mlp.experts.experts.linear_fc1.weight is [4, 8, 192, 64] in it, [4, 8,"
        " 128, 64] in this configuration" in log
    )
    assert "decoder.layers.self_attention.q_layernorm.weight [4, 16] is not in it" in log
    assert len(log[log.index("problem") :].splitlines()) < 12


def test_another_optimizer_is_refused_with_the_names_that_are_missing(trained, tmp_path):
    overrides = ["trainer.max_steps=4", "optimizer=sgd", "optimizer.lr_warmup_steps=0"]
    log = refused(start_again(trained, tmp_path, *overrides), trained)
    assert (
        "optimizer.state.momentum_buffer.embedding.word_embeddings.weight [256, 64] is not in it"
        in log
    )


def test_other_data_are_refused(trained, tmp_path):
    log = refused(
        start_again(trained, tmp_path, "trainer.max_steps=4", "data.seq_length=16"), trained
    )
    assert "other data" in log and "checkpoint.load_weights=" in log


def test_fewer_steps_than_there_are_is_refused(trained, tmp_path):
    log = refused(start_again(trained, tmp_path, "trainer.max_steps=3", step=4), trained)
    assert "trainer.max_steps = 3" in log and "4 steps already" in log


def test_must_without_a_valid_checkpoint_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "iter_0000002").mkdir()
    _, codes, log = start(tmp_path, *TWO, "trainer.max_steps=4", "checkpoint.resume=must")
    assert (
        codes == {REFUSED}
        and "integrity.json is missing" in log
        and "holds no valid checkpoint" in log
    )


def test_another_batch_size_goes_on_with_the_next_samples(trained, tmp_path):
    run_dir, codes, log = start_again(
        trained, tmp_path, "trainer.max_steps=4", "trainer.global_batch_size=4"
    )
    assert codes == {FINISHED}, log
    assert [r["consumed_samples"] for r in records(run_dir) if "lm_loss" in r] == [8, 16, 20, 24]
    assert "changed since then: trainer.global_batch_size = 4 (was 8)" in log


def test_the_weights_alone_start_a_new_run(trained, tmp_path):
    overrides = [
        "trainer.max_steps=1",
        f"checkpoint.load_weights={newest(trained)}",
        "optimizer.lr=0",
    ]
    overrides += [
        "model.rotary_base=10000",
        "checkpoint.acknowledge_differences=[model.rotary_base]",
    ]
    run_dir, codes, log = start(tmp_path, EP + "1", *overrides, "optimizer.min_lr=0")
    assert codes == {FINISHED}, log
    assert f"weights of {newest(trained)}" in log
    differing = unequal(path_of(run_dir, 1), newest(trained))
    assert differing and all(
        key.startswith(("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."))
        for key in differing
    )
    assert records(run_dir)[0]["consumed_samples"] == 8


def test_weights_for_another_rotary_base_are_refused_with_both_values(trained, tmp_path):
    overrides = [
        "trainer.max_steps=1",
        f"checkpoint.load_weights={newest(trained)}",
        "model.rotary_base=10000",
    ]
    _, codes, log = start(tmp_path, EP + "1", *overrides)
    assert codes == {REFUSED} and "Traceback" not in log, log
    assert f"model.rotary_base = 10000, but the weights of {newest(trained)} are for 1000000" in log


def test_a_run_does_not_go_on_as_another_model_of_the_same_shapes(trained, tmp_path):
    log = refused(
        start_again(trained, tmp_path, "trainer.max_steps=4", "model.layernorm_epsilon=1e-3"),
        trained,
    )
    assert "model.layernorm_epsilon = 0.001, but the weights of" in log and "are for 1e-05" in log


def test_weights_that_are_not_there_are_refused(tmp_path):
    _, codes, log = start(
        tmp_path, *TWO, "trainer.max_steps=1", f"checkpoint.load_weights={tmp_path}/nothing"
    )
    assert (
        codes == {REFUSED}
        and "checkpoint.load_weights" in log
        and "integrity.json is missing" in log
    )


def test_only_the_newest_are_kept(tmp_path):
    overrides = ["trainer.max_steps=5", "checkpoint.save_interval=1", "checkpoint.keep_last=2"]
    run_dir, codes, log = start(tmp_path, *TWO, *overrides)
    assert codes == {FINISHED}, log
    assert directory.steps_in(run_dir) == [5, 4] and directory.tracked_step(run_dir) == 5
    assert log.count("saved iter_") == 5


# A save that fails


def small_files(identity) -> None:
    """From step 3 on, no file of rank 1 may grow beyond 100,000 bytes."""
    write = shard_writer.write_shards
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(path, rank, *rest):
        if path.name == "iter_0000004.saving" and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return write(path, rank, *rest)

    shard_writer.write_shards = limited


def test_a_disk_that_fills_is_an_error_with_both_numbers_and_the_old_checkpoint_is_intact(tmp_path):
    run_dir, codes, log = start(tmp_path, *TWO, "trainer.max_steps=5", INTERVAL, before=small_files)
    assert codes == {FAULT}, log
    reason = read_status(run_dir)["reason"]
    assert re.search(r"on rank 1: .*iter_0000004.saving/__1_\d.distcp: File too large", reason)
    assert re.search(
        r"of its [\d,]+ bytes [\d,]+ were written, [\d,]+ are free; iter_0000002 is complete",
        reason,
    )
    assert directory.steps_in(run_dir) == [2] and not list(run_dir.glob("*.saving"))
    assert integrity.problem(path_of(run_dir, 2), full=True) == ""


def full_disk(identity) -> None:
    """The disk is full for every writer of the second save."""
    write = shard_writer.write_shards

    def filled(path, *rest):
        if path.name == "iter_0000004.saving":
            fill(path.parent)
        return write(path, *rest)

    shard_writer.write_shards = filled


def test_a_disk_full_to_the_last_byte_in_an_async_save_is_a_line_that_says_what_to_type(tmp_path):
    with tiny_disk(tmp_path, "40m", "run"):
        overrides = ["trainer.max_steps=50", INTERVAL, "checkpoint.async_save=true"]
        run_dir, codes, log = start(tmp_path, *TWO, *overrides, before=full_disk)
        assert codes == {FAULT} and "Traceback" not in log, log
        # written in place of the previous one: there is no room for another file
        status = read_status(run_dir)
        assert status["state"] == "failed" and "No space left on device" in status["reason"]
        message = (
            "iter_0000002 is complete: free some space and run the same command again to"
            " resume from it"
        )
        assert status["reason"].endswith(message) and log.endswith(f"{message}\n")
        assert directory.steps_in(run_dir) == [2]
        assert integrity.problem(path_of(run_dir, 2), full=True) == ""


def saver_of(run_dir: Path) -> save.Saver:
    """Return a Saver with only the attributes for disk checks."""
    saver = object.__new__(save.Saver)
    saver.run_dir = run_dir
    return saver


def test_a_save_that_the_disk_has_no_room_for_is_not_begun_and_its_margin_is_said(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(save, "MARGIN", 1 << 60)
    half = tmp_path / "iter_0000004.saving"
    half.mkdir()
    with pytest.raises(OSError) as caught:
        saver_of(tmp_path)._prepare(half, 1_551_126, None)
    message = (
        r"it takes 1,551,126 bytes and a margin of 1,152,921,504,606,846,976 for its small files,"
        r" [\d,]+ are free"
    )
    assert re.fullmatch(message, caught.value.strerror) and not half.exists()


def test_what_was_written_is_counted_before_it_is_removed(tmp_path):
    assert saver_of(tmp_path)._disk_use(3000) == ""  # nothing was begun
    (tmp_path / "iter_0000004.saving").mkdir()
    for name, size in (("__0_0.distcp", 2000), ("__1_0.distcp", 234)):
        (tmp_path / "iter_0000004.saving" / name).write_bytes(b"x" * size)
    message = saver_of(tmp_path)._disk_use(3000)
    assert re.fullmatch(r"; of its 3,000 bytes 2,234 were written, [\d,]+ are free", message)


def writer_that(what: int):
    """Return a `before` that sends a signal to every writer of rank 1 when it starts."""

    def before(identity) -> None:
        fork = os.fork

        def forked() -> int:
            child = fork()
            if child and identity.rank == 1:
                os.kill(child, what)
            return child

        os.fork = forked

    return before


def test_a_writer_that_dies_is_an_error_soon(tmp_path):
    overrides = ["trainer.max_steps=5", "checkpoint.save_interval=3", "checkpoint.async_save=true"]
    started = time.monotonic()
    run_dir, codes, log = start(tmp_path, *TWO, *overrides, before=writer_that(signal.SIGKILL))
    assert codes == {FAULT}, log
    assert "the writer of rank 1 was ended by SIGKILL" in read_status(run_dir)["reason"]
    assert directory.steps_in(run_dir) == [] and time.monotonic() - started < 60


def test_a_writer_that_stands_still_is_ended_in_time(tmp_path):
    overrides = ["trainer.max_steps=5", "checkpoint.save_interval=3", "checkpoint.async_save=true"]
    run_dir, codes, log = start(
        tmp_path,
        *TWO,
        *overrides,
        "trainer.timeout_minutes=0.1",
        before=writer_that(signal.SIGSTOP),
    )
    assert codes == {FAULT}, log
    assert (
        "the writer of rank 1 had not finished after 6 s and was ended"
        in read_status(run_dir)["reason"]
    )


def test_async_saves_follow_each_other_in_order_and_the_last_is_there_at_the_end(tmp_path):
    overrides = ["trainer.max_steps=4", "checkpoint.save_interval=1", "checkpoint.async_save=true"]
    run_dir, codes, log = start(tmp_path, *TWO, *overrides)
    assert codes == {FINISHED}, log
    assert re.findall(r"saved (iter_\d+)", log) == [f"iter_{step:07d}" for step in (1, 2, 3, 4)]
    assert json.loads((path_of(run_dir, 4) / "run_state.json").read_text())["step"] == 4
    assert all(integrity.problem(path_of(run_dir, step), full=True) == "" for step in (1, 2, 3, 4))
