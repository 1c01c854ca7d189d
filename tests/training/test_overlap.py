"""Overlapped reductions and gathers give the same weights, also with validation in between."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from checkpoints import tensors_of, unequal
from composing import plan_of
from rank_workers import run_ranks
from test_parity import EP, PP, TINY

from mixtrain.errors import FINISHED
from mixtrain.training.worker import run

OVERLAPPED = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
# no validation or test that would gather what a save needs
UNSEEN = ["trainer.limit_val_batches=0"]
SEEN = ["trainer.limit_val_batches=1", "trainer.val_check_interval=1"]
# Without clipping: the norm is a sum over shards, whose bounds the buckets move.
# Two data-parallel ranks: the sum of two numbers is the same in either order.
COMMON = [
    "optimizer.clip_grad=0",
    "optimizer.bucket_size=20000",
    "checkpoint=last",
    "logging=files",
]
TIED = "model.untie_embeddings_and_output_weights=false"
LAYOUTS = {
    "DP2, tied embeddings": [EP + "1", "trainer.devices=2", TIED],
    "DP2xPP2xVPP2": [
        EP + "1",
        PP + "2",
        "parallel.virtual_pipeline_model_parallel_size=2",
        "trainer.devices=4",
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the directory of a finished run of three steps; each run once."""

    @cache
    def start(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        paths = [
            f"run_dir={folder}/run",
            f"data.path_to_cache={folder}/cache",
            "trainer.log_every_n_steps=1",
        ]
        plan = plan_of(*TINY, *COMMON, *paths, *overrides)
        assert set(
            run_ranks(plan.world_size, lambda identity: run(plan, identity), folder / "ranks")
        ) == {FINISHED}
        return folder / "run"

    return start


def logged(directory: Path, key: str) -> list[float]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [record[key] for record in lines if key in record]


def differing(here: Path, there: Path) -> list[str]:
    """Return the tensors of two checkpoints after step 3 that differ in any bit."""
    a = here / "iter_0000003"
    b = there / "iter_0000003"
    layout = (
        [EP + "1", TIED]
        if "untie_embeddings_and_output_weights: false" in _config(here)
        else [EP + "1"]
    )
    parameters = sum(
        tensor.numel() for key, tensor in tensors_of(a).items() if not key.startswith("optimizer.")
    )
    assert parameters == plan_of(*TINY, *layout).total_parameters
    return unequal(a, b)


def _config(run_dir: Path) -> str:
    return (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_after_overlapped_steps_has_the_weights_of_steps_one_after_the_other(
    name, trained
):
    plain = trained(*LAYOUTS[name], *UNSEEN)
    overlapped = trained(*LAYOUTS[name], *UNSEEN, *OVERLAPPED)
    assert logged(plain, "lm_loss") == logged(overlapped, "lm_loss")
    assert differing(plain, overlapped) == []


@pytest.mark.long
def test_validation_between_overlapped_steps_sees_the_same_weights_and_changes_none(trained):
    layout = LAYOUTS["DP2, tied embeddings"]
    plain = trained(*layout, *SEEN)
    overlapped = trained(*layout, *SEEN, *OVERLAPPED)
    never = trained(*layout, *UNSEEN, *OVERLAPPED)
    assert (
        logged(overlapped, "val_loss") == logged(plain, "val_loss")
        and len(logged(plain, "val_loss")) == 3
    )
    assert logged(overlapped, "test_loss") == logged(plain, "test_loss") != []
    assert logged(overlapped, "lm_loss") == logged(plain, "lm_loss") == logged(never, "lm_loss")
    assert logged(never, "val_loss") == logged(never, "test_loss") == []
    # every step moves the weights far enough to be seen
    assert len(set(logged(plain, "val_loss"))) == 3
    assert differing(overlapped, never) == []
