"""A resumed run equals an uninterrupted one; at another layout its state is bitwise the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from checkpoints import tensors_of, unequal
from composing import plan_of
from rank_workers import run_ranks
from test_parity import CP, EP, ETP, OVERLAPPED, PLAIN, PP, TINY, TP, VPP

from mixtrain.checkpoint.save import Saver
from mixtrain.config import tensor_schema
from mixtrain.errors import FINISHED
from mixtrain.training import resume
from mixtrain.training.worker import run

TIMING = ("tokens_per_second", "step_seconds")
# what is left to the run's length by default, so that runs of different lengths are the same run
SHORT = [
    *TINY,
    "trainer.micro_batch_size=2",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=2",
    "optimizer.lr_decay_steps=8",
    "logging=files",
    "checkpoint.keep_last=null",
    "data.num_workers=0",
]
INTERVAL = "checkpoint.save_interval=2"


def start(folder: Path, *overrides: str, before=None) -> tuple[Path, set[int], str]:
    """Run or resume on forked ranks in folder/run; return (run_dir, codes, rank 0's output)."""
    plan = plan_of(
        *SHORT, f"run_dir={folder}/run", f"data.path_to_cache={folder}/cache", *overrides
    )

    def one_rank(identity) -> int:
        if before:
            before(identity)
        return run(plan, identity)

    codes = set(run_ranks(plan.world_size, one_rank, folder / "ranks"))
    shutil.rmtree(folder / "cache", ignore_errors=True)
    log = (folder / "ranks" / "rank_0.log").read_text()
    shutil.rmtree(folder / "ranks")
    return folder / "run", codes, log


def records(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / f"iter_{step:07d}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the directory of a run of four steps that saves after the second; each run once."""

    @cache
    def trained(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        run_dir, codes, log = start(folder, "trainer.max_steps=4", INTERVAL, *overrides)
        assert codes == {FINISHED}, log
        return run_dir

    return trained


def interrupted(run_dir: Path, folder: Path, step: int = 2) -> Path:
    """Copy a run to folder/run as it was after saving `step`; its metrics continue beyond it."""
    shutil.copytree(run_dir, folder / "run")
    for later in (folder / "run").glob("iter_*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    return folder / "run"


LAYOUTS = {
    "EP1": [EP + "1"],
    "EP2": [EP + "2"],
    "EP4xDP4": [EP + "4"],
    "TP2xPP2": [EP + "1", PP + "2", *TP],
    "EP2xETP2": [EP + "2", ETP, *TP],
    "DP2": [EP + "1", "trainer.devices=2"],
    "DP2, overlapped": [EP + "1", "trainer.devices=2", *OVERLAPPED],
    "DP2 without the distributed optimizer": [EP + "1", "trainer.devices=2", PLAIN],
    "PP2xVPP2": [EP + "1", PP + "2", VPP],
    "CP2xEP2": [EP + "2", CP],
    "two optimizer instances": [
        EP + "2",
        "trainer.devices=4",
        "parallel.num_distributed_optimizer_instances=2",
    ],
    "local": [EP + "2", "model.transformer_impl=local", "model.moe_grouped_gemm=false"],
}
BF16 = ["trainer.precision=bf16", "optimizer.grad_reduce_in_fp32=false"]
SAME = {  # the same words before and after
    **{name: LAYOUTS[name] for name in ("EP2", "TP2xPP2", "DP2, overlapped", "PP2xVPP2", "local")},
    "EP2 in bf16": [EP + "2", *BF16],
    "DP2 in bf16 without the distributed optimizer": [EP + "1", "trainer.devices=2", PLAIN, *BF16],
    "jitter": [EP + "2", "router.moe_input_jitter_eps=0.01"],
    "forced balance": [EP + "2", "router=forced_balance"],
    "expert bias": [EP + "2", "router=expert_bias", "router.moe_router_bias_update_rate=0.1"],
    "global auxiliary loss": [EP + "2", "router=global_aux_loss"],
    "sgd": [EP + "2", "optimizer=sgd", "optimizer.lr_warmup_steps=0"],
    "tied embeddings": [EP + "1", PP + "2", "model.untie_embeddings_and_output_weights=false"],
    "ramp-up": [EP + "2", "trainer.micro_batch_size=1", "trainer.rampup_batch_size=[4,2,24]"],
    "read ahead": [EP + "2", "data.num_workers=1"],
    "async": [EP + "2", "checkpoint.async_save=true"],
}

# one of each kind; the others are for make test-long
QUICK = {
    "EP2",
    "DP2, overlapped",
    "PP2xVPP2",
    "CP2xEP2",
    "DP2 without the distributed optimizer",
    "expert bias",
    "ramp-up",
    "read ahead",
    "async",
}


def some_long(names) -> list:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", some_long(SAME))
def test_a_resumed_run_is_bitwise_the_one_that_was_not_interrupted(name, whole, tmp_path):
    run_dir = whole(*SAME[name])
    again = interrupted(run_dir, tmp_path)
    _, codes, log = start(tmp_path, "trainer.max_steps=4", *SAME[name])
    assert codes == {FINISHED}, log
    assert "resumed from" in log and "after 2 steps" in log
    assert records(again) == records(run_dir)
    assert unequal(path_of(again, 4), path_of(run_dir, 4)) == []


@pytest.mark.parametrize("name", some_long(LAYOUTS))
def test_another_layout_has_bitwise_what_was_saved_and_goes_on_with_the_same_loss(
    name, whole, tmp_path
):
    run_dir = whole(*LAYOUTS["EP1"])
    interrupted(run_dir, tmp_path)

    def save_again(identity) -> None:
        enter = resume.enter

        def entered(plan, ranks, training, *rest):
            state = enter(plan, ranks, training, *rest)
            elsewhere = replace(plan, config=replace(plan.config, run_dir=str(tmp_path / "again")))
            Saver(elsewhere, ranks, training, print).save(state)
            return state

        resume.enter = entered

    (tmp_path / "again").mkdir()
    _, codes, log = start(tmp_path, "trainer.max_steps=4", *LAYOUTS[name], before=save_again)
    assert codes == {FINISHED}, log
    assert unequal(path_of(tmp_path / "again", 2), path_of(run_dir, 2)) == []
    losses, wanted = (
        [r["lm_loss"] for r in records(d) if "lm_loss" in r] for d in (tmp_path / "run", run_dir)
    )
    assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "name", some_long(["EP4xDP4", "EP2xETP2", "PP2xVPP2", "DP2 without the distributed optimizer"])
)
def test_what_another_layout_has_saved_comes_back_to_one_rank(name, whole, tmp_path):
    there = interrupted(whole(*LAYOUTS[name]), tmp_path)
    _, codes, log = start(tmp_path, "trainer.max_steps=4", *LAYOUTS["EP1"])
    assert codes == {FINISHED}, log
    alone = [r["lm_loss"] for r in records(whole(*LAYOUTS["EP1"])) if "lm_loss" in r]
    assert [r["lm_loss"] for r in records(there) if "lm_loss" in r] == pytest.approx(
        alone, rel=1e-5
    )


def test_a_checkpoint_has_the_keys_and_shapes_of_the_contract_and_three_of_them_for_the_optimizer(
    whole,
):
    run_dir = whole(*LAYOUTS["EP2"])
    config = plan_of(*SHORT, *LAYOUTS["EP2"]).config
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(path_of(run_dir, 4)).items()}
    model = tensor_schema.shapes(config)
    states = {
        f"optimizer.state.{name}.{key}": model[key]
        for name in ("param", "exp_avg", "exp_avg_sq")
        for key in model
    }
    assert shapes == model | states
