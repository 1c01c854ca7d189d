"""A whole run on forked ranks: its records, how it stops, how it fails."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from composing import plan_of
from megatron.core import dist_checkpointing
from rank_workers import run_ranks
from test_init import EP
from test_parity import TINY

from mixtrain.config.typed_config import from_hydra
from mixtrain.engine import model, process_groups, shards
from mixtrain.errors import FAULT, FINISHED
from mixtrain.system.status import read_status
from mixtrain.training.worker import run

KEYS = {
    "step",
    "lm_loss",
    "load_balancing_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "step_seconds",
    "consumed_samples",
    "tokens_per_expert",
    "skipped_steps",
    "sample_digest",
}
RUN = [
    *TINY,
    "trainer.micro_batch_size=2",
    EP + "2",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=2",
]


def start(folder: Path, *overrides: str, before=None, world: int = 2) -> tuple[Path, list[int]]:
    """Run on forked ranks; return the run directory and every rank's exit code.

    `before` is called on each rank first.
    """
    plan = plan_of(*RUN, f"run_dir={folder}/run", f"data.path_to_cache={folder}/cache", *overrides)

    def one_rank(identity) -> int:
        if before:
            before(identity)
        return run(plan, identity)

    return folder / "run", run_ranks(world, one_rank, folder / "ranks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    directory, codes = start(folder, "trainer.max_steps=4")
    assert codes == [FINISHED, FINISHED]
    return directory


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_says_so(finished):
    assert read_status(finished) == {
        "state": "finished",
        "step": 4,
        "max_steps": 4,
        "reason": "trainer.max_steps",
    }


def test_a_logged_step_has_every_metric(finished):
    steps = [record for record in records(finished) if "lm_loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(set(record) == KEYS | {"tags"} for record in steps)
    assert [record["consumed_samples"] for record in steps] == [8, 16, 24, 32]
    assert all(math.isfinite(record["lm_loss"]) and record["step_seconds"] > 0 for record in steps)
    assert steps[0]["tokens_per_second"] == pytest.approx(8 * 32 / steps[0]["step_seconds"])
    # a token counts once for each of its two experts, in each of four layers
    assert all(
        [sum(layer) for layer in record["tokens_per_expert"]] == [8 * 32 * 2] * 4
        for record in steps
    )


def test_validation_comes_at_its_interval_and_a_test_loss_at_the_end(finished):
    assert [record["step"] for record in records(finished) if "val_loss" in record] == [2, 4]
    assert [record["step"] for record in records(finished) if "test_loss" in record] == [4]


def test_mock_data_is_said_in_plan_metrics_and_log(finished):
    assert (finished / "plan.txt").read_text().startswith("MOCK DATA")
    assert all(record["tags"] == ["MOCK"] for record in records(finished))
    assert "MOCK DATA" in (finished.parent / "ranks" / "rank_0.log").read_text()


def test_the_resolved_configuration_reads_back(finished):
    from omegaconf import OmegaConf

    config = from_hydra(OmegaConf.load(finished / "config.yaml"))
    assert (config.trainer.devices, config.optimizer.lr_decay_steps, config.trainer.max_steps) == (
        2,
        4,
        4,
    )


def test_the_report_and_the_tensorboard_files_are_there(finished):
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").glob("events.*"))


def test_the_lines_of_the_terminal_fit_100_columns(finished):
    lines = (finished.parent / "ranks" / "rank_0.log").read_text().splitlines()
    table = lines[
        next(
            number for number, line in enumerate(lines) if line.split()[:2] == ["step", "lm_loss"]
        ) :
    ]
    assert len([line for line in table if line.split()[0].isdigit()]) == 4 + 2 + 1
    assert all(len(line) <= 100 for line in table if not line.startswith("finished"))


def test_the_weights_load_at_another_layout(finished, tmp_path):
    """Saved by two expert-parallel ranks, loaded by one: complete, and not the initial weights."""
    assert (finished / "latest_checkpointed_iteration.txt").read_text() == "4\n"
    plan = plan_of(*TINY, EP + "1")

    def load(identity) -> list[float]:
        with process_groups.start(plan, identity) as here:
            (chunk,) = model.build(plan, here.device)
            before = [shard.data.detach().clone() for shard in shards.shards(chunk)]
            state = {
                "model": {
                    k: v for k, v in chunk.sharded_state_dict().items() if "_extra_state" not in k
                }
            }
            loaded = dist_checkpointing.load(state, str(finished / "iter_0000004"))
            chunk.load_state_dict(loaded["model"], strict=False)
            return [
                (shard.data - old).abs().max().item()
                for shard, old in zip(shards.shards(chunk), before, strict=True)
            ]

    (moved,) = run_ranks(1, load, tmp_path)
    assert len(moved) == 3 + 4 * 5 + 4 * 8 * 3 and all(0 < distance < 0.1 for distance in moved)


def test_a_run_that_is_asked_to_stop_ends_its_step_and_saves(tmp_path):
    """One rank of two gets the signal; both stop after the same step."""

    def signal_soon(identity) -> None:
        if identity.rank == 1:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            signal.setitimer(signal.ITIMER_REAL, 3.0)

    directory, codes = start(tmp_path, "trainer.max_steps=100000", before=signal_soon)
    status = read_status(directory)
    assert (
        codes == [FINISHED, FINISHED]
        and status["state"] == "stopped"
        and 0 < status["step"] < 100000
    )
    assert (directory / f"iter_{status['step']:07d}" / "metadata.json").exists()
    assert records(directory)[-1]["step"] == status["step"]


def test_a_loss_that_is_not_a_number_stops_all_ranks_and_names_step_and_rank(tmp_path):
    def poison(identity) -> None:
        build = model.build

        def poisoned(*arguments):
            models = build(*arguments)
            with torch.no_grad():
                if identity.rank == 1:
                    models[0].output_layer.weight.fill_(math.nan)
            return models

        model.build = poisoned

    directory, codes = start(tmp_path, before=poison)
    assert codes == [FAULT, FAULT]
    assert read_status(directory)["state"] == "failed"
    assert "step 1: lm_loss is not finite on rank 1" in read_status(directory)["reason"]
    assert not list(directory.glob("iter_*"))
    assert "Traceback" not in (tmp_path / "ranks" / "rank_0.log").read_text()


def test_a_held_out_loss_that_is_not_a_number_stops_all_ranks_and_is_not_written(tmp_path):
    def poison(identity) -> None:
        build = model.build

        def poisoned(*arguments):
            models = build(*arguments)
            models[0].register_forward_hook(
                lambda module, _, output: output if module.training else output * math.nan
            )
            return models

        model.build = poisoned

    directory, codes = start(tmp_path, before=poison)
    assert codes == [FAULT, FAULT]
    assert "step 2: the loss of the held-out data is nan" in read_status(directory)["reason"]
    assert [record["step"] for record in records(directory)] == [1, 2]
    assert not list(directory.glob("iter_*"))


def test_a_gradient_norm_that_is_not_a_number_stops_the_run(tmp_path):
    directory, codes = start(tmp_path, "optimizer.lr=1e30", "optimizer.clip_grad=0")
    assert codes == [FAULT, FAULT]
    assert (
        "is not finite" in read_status(directory)["reason"]
        or "grad_norm is" in read_status(directory)["reason"]
    )


def test_the_same_seed_gives_the_same_numbers_again_to_the_last_bit(tmp_path):
    curves = []
    for name in ("a", "b"):
        directory, _ = start(tmp_path / name, "trainer.deterministic=true", "checkpoint=none")
        curves.append(
            [(r["lm_loss"], r["grad_norm"]) for r in records(directory) if "lm_loss" in r]
        )
        assert not list(directory.glob("iter_*"))
    assert curves[0] == curves[1]


def test_bf16_trains(tmp_path):
    directory, codes = start(
        tmp_path, "trainer.precision=bf16", "optimizer.grad_reduce_in_fp32=false", "checkpoint=none"
    )
    losses = [record["lm_loss"] for record in records(directory) if "lm_loss" in record]
    assert codes == [FINISHED, FINISHED] and losses[0] == pytest.approx(math.log(256), abs=0.1)


def test_the_expert_bias_moves_against_the_load_and_is_logged(tmp_path):
    words = [
        "router=expert_bias",
        "router.moe_router_bias_update_rate=0.1",
        "checkpoint=none",
        "data.seq_length=32",
    ]
    directory, codes = start(tmp_path, *words, "parallel.pipeline_model_parallel_size=2", world=4)
    assert codes == [FINISHED] * 4
    first = next(record for record in records(directory) if record["step"] == 1)
    for load, bias in zip(first["tokens_per_expert"], first["expert_bias"], strict=True):
        mean = sum(load) / len(load)
        wanted = [0.1 if tokens < mean else -0.1 if tokens > mean else 0.0 for tokens in load]
        assert bias == pytest.approx(wanted)


def test_forced_balance_is_said_in_plan_metrics_and_log(tmp_path):
    directory, codes = start(
        tmp_path, "router=forced_balance", "checkpoint=none", "trainer.max_steps=1"
    )
    assert codes == [FINISHED, FINISHED]
    assert "FORCED" in (directory / "plan.txt").read_text()
    assert all(record["tags"] == ["MOCK", "FORCED"] for record in records(directory))
    assert "FORCED" in (tmp_path / "ranks" / "rank_0.log").read_text()


@pytest.mark.parametrize("router", ["aux_loss", "seq_aux_loss", "global_aux_loss", "combined"])
def test_the_balance_is_near_1_before_anything_is_learnt(router, tmp_path):
    directory, _ = start(tmp_path, f"router={router}", "checkpoint=none", "trainer.max_steps=1")
    assert records(directory)[0]["load_balancing_loss"] == pytest.approx(1.0, abs=0.1)


DROPPED = [EP + "2", "checkpoint=none", "trainer.max_steps=1"]


def test_dropped_tokens_are_not_counted_padded_or_not(tmp_path):
    counts = []
    for name in ("drop", "drop_and_pad"):
        words = [f"dispatcher={name}", "dispatcher.moe_expert_capacity_factor=0.75"]
        directory, _ = start(tmp_path / name, *words, *DROPPED)
        (record,) = [record for record in records(directory) if "lm_loss" in record]
        counts.append(record["tokens_per_expert"])
        # layers, sequences, their tokens, experts of each
        routed = 4 * 8 * 32 * 2
        left = sum(map(sum, counts[-1]))
        assert (
            record["token_drop_rate"] == pytest.approx((routed - left) / routed) and left < routed
        )
        head, *lines = (
            (tmp_path / name / "ranks" / "rank_0.log").read_text().split("lm_loss")[1].splitlines()
        )
        assert head.endswith(" dropped") and lines[0].endswith(f" {(routed - left) / routed:.2%}")
    assert counts[0] == counts[1]
    assert all(sum(layer) < 8 * 32 * 2 for layer in counts[0])


def test_the_part_that_is_dropped_is_of_all_ranks_and_of_the_batch_of_the_step(tmp_path):
    """With room for one token per expert a microbatch keeps at most eight rows; else all."""
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    ramp = ["trainer.rampup_batch_size=[4,4,4]", "trainer.max_steps=2", "checkpoint=none"]
    least = ["dispatcher=drop", "dispatcher.moe_expert_capacity_factor=0.1", *layout, *ramp]
    directory, _ = start(tmp_path / "least", *least)
    steps = [record for record in records(directory) if "lm_loss" in record]
    for record, sequences in zip(steps, (4, 8), strict=True):
        routed = 4 * sequences * 32 * 2
        left = sum(map(sum, record["tokens_per_expert"]))
        assert (
            record["token_drop_rate"] == pytest.approx(1 - left / routed)
            and 0.85 < record["token_drop_rate"] < 1
        )
    directory, _ = start(
        tmp_path / "all", "dispatcher=drop", "dispatcher.moe_expert_capacity_factor=4", *DROPPED
    )
    (record,) = [record for record in records(directory) if "lm_loss" in record]
    assert record["token_drop_rate"] == 0
