"""The plan's page: every figure a user plans with, MOCK where the data is mock, and no line too
wide.
"""

from __future__ import annotations

import pytest
from composing import RECIPES, derived, plan_of

from mixtrain.config.plan_page import render

RECIPE = "+recipe=mixtral_8x7b_ep8"
WIDTH = 100


def line(page: str, name: str) -> str:
    """What stands behind `name` on the page."""
    (found,) = [text for text in page.splitlines() if text.strip().startswith(name)]
    return found.strip().removeprefix(name).strip()


@pytest.mark.parametrize("shrink", [[], ["+shrink=laptop"]], ids=str)
@pytest.mark.parametrize("recipe", [[], *[[f"+recipe={name}"] for name in RECIPES]], ids=str)
def test_a_plan_is_a_page_of_lines_that_fit(recipe, shrink):
    lines = render(derived(*recipe, *shrink)).splitlines()
    assert len(lines) < 48
    assert [text for text in lines if len(text) > WIDTH or text != text.rstrip()] == []


def test_mock_data_is_said_on_top_and_beside_the_data():
    page = render(plan_of(RECIPE))
    assert page.startswith("MOCK")
    assert line(page, "data") == "MOCK"
    assert "MOCK" not in render(plan_of())


def test_indexed_data_is_named():
    page = render(
        plan_of(RECIPE, "data=indexed", "data.data_path=['0.3',a,'0.7',b]", "data.tokenizer=t")
    )
    assert "MOCK" not in page
    assert line(page, "data") == "0.3, a, 0.7, b"


def test_the_recipes_page_shows_its_figures():
    page = render(plan_of(RECIPE))
    assert line(page, "ranks") == "16 on 2 nodes of 8 (gpu)"
    assert line(page, "dense grid") == "TP 1 x CP 1 x DP 16 x PP 1"
    assert line(page, "expert grid") == "ETP 1 x EP 8 x EDP 2 x PP 1"
    assert "256 sequences of 4096 = 1,048,576 tokens a step" in line(page, "batch")
    assert line(page, "microbatches") == "16 of 1 on each rank"
    assert "500,000" in line(page, "steps")
    for fragment in (
        "32 layers",
        "hidden 4096",
        "8 experts",
        "top-2",
        "FFN 14336",
        "vocabulary 32000",
    ):
        assert fragment in line(page, "model")
    for fragment in ("torch, bf16", "router aux_loss", "alltoall", "recompute full"):
        assert fragment in page
    assert line(page, "parameters") == "46,702,792,704 in all, 12,879,925,248 active per token"
    assert (
        line(page, "on a rank") == "7,242,780,672 = 1,605,636,096 dense + 5,637,144,576 of experts"
    )
    assert line(page, "state on a rank").startswith("59.6 GiB")
    assert "75% of 80 GB, 43% of 141 GB, 75% of trainer.device_memory_gib = 79" in line(
        page, "beside"
    )
    assert line(page, "optimizer shards") == "dense over 16 ranks, experts over 2"


def test_a_small_state_is_shown_in_mib_and_no_device_is_compared_that_was_not_given():
    page = render(plan_of())
    assert line(page, "ranks") == "2 on 1 node of 2 (cpu)"
    assert line(page, "steps") == "300 = 614,400 tokens"
    assert line(page, "state on a rank").startswith("94.6 MiB")
    assert "device_memory_gib" not in page


def experts_on_ranks(page: str) -> list[str]:
    return [
        text.split("experts on ranks")[1].strip()
        for text in page.splitlines()
        if "experts on ranks" in text
    ]


def test_the_ranks_that_hold_the_experts_are_shown_group_by_group():
    assert experts_on_ranks(render(plan_of(RECIPE))) == [
        "ranks 0-7: 1 expert of 8 on each, in every layer",
        "ranks 8-15: a copy of these",
    ]
    assert experts_on_ranks(render(plan_of())) == [
        "ranks 0-1: 4 experts of 8 on each, in every layer"
    ]
    one = experts_on_ranks(render(plan_of("parallel=ep1", "trainer.devices=1")))
    assert one == ["ranks 0: 8 experts of 8 on each, in every layer"]


def test_of_many_groups_four_are_shown_and_the_others_counted():
    groups = experts_on_ranks(render(plan_of(RECIPE, "trainer.num_nodes=16")))
    assert len(groups) == 4
    assert groups[3] == "ranks 24-31: a copy of these; 12 more groups of 8"
    groups = experts_on_ranks(render(plan_of(RECIPE, "trainer.num_nodes=4")))
    assert groups[3] == "ranks 24-31: a copy of these"


def test_experts_cut_by_tensor_parallelism_fill_more_ranks():
    groups = experts_on_ranks(render(derived(RECIPE, "parallel.expert_tensor_parallel_size=2")))
    assert groups == ["ranks 0-15: 1 expert of 8 on each, in every layer"]


def rows(page: str, name: str) -> list[str]:
    return [
        text.removeprefix(f"  {name}").strip()
        for text in page.splitlines()
        if text.startswith(f"  {name}")
    ]


def test_every_stage_of_a_pipeline_is_shown_with_its_ranks_its_chunks_and_whose_experts_it_has():
    page = render(
        plan_of("parallel=pp2_vpp2", "trainer.devices=4", "parallel.expert_model_parallel_size=2")
    )
    assert [" ".join(row.split()) for row in rows(page, "stage")] == [
        "0 ranks 0-1: embedding, 2 chunks of 1 layer",
        "1 ranks 2-3: 2 chunks of 1 layer, loss; experts as on stage 0",
    ]
    assert experts_on_ranks(page) == ["ranks 0-1: 4 experts of 8 on each, in every layer"]
    assert "stage" not in render(plan_of())


def test_stages_in_a_row_that_hold_the_same_are_one_row_and_chunks_that_differ_are_counted():
    page = render(plan_of("+recipe=mixtral_8x22b_tp2_pp8_ep8"))
    assert [" ".join(row.split()) for row in rows(page, "stage")] == [
        "0 ranks 0-15: embedding, 7 layers",
        "s 1-6 ranks 16-31 to 96-111: 7 layers; experts as on stage 0",
        "7 ranks 112-127: 7 layers, loss; experts as on stage 0",
    ]
    layout = [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.pipeline_model_parallel_layout='Ett|t|t|L'",
    ]
    page = render(plan_of(*layout))
    assert [row.partition(": ")[2] for row in rows(page, "stage")] == [
        "embedding, chunks of 2, 1 layers",
        "chunks of 1, 0 layers, loss; experts as on stage 0",
    ]


def test_the_experts_are_those_of_the_first_stage_that_has_layers():
    layout = [
        "parallel.pipeline_model_parallel_size=4",
        "parallel.pipeline_model_parallel_layout='E|ttt|t|L'",
    ]
    page = render(plan_of(*layout))
    assert [text.partition("ranks ")[2] for text in rows(page, "stage")] == [
        "0-1: embedding, 0 layers",
        "2-3: 3 layers",
        "4-5: 1 layer; experts as on stage 1",
        "6-7: 0 layers, loss",
    ]
    assert experts_on_ranks(page) == ["ranks 2-3: 4 experts of 8 on each, in every layer"]


def test_activations_are_shown_from_below_beside_the_state():
    assert line(render(plan_of(RECIPE)), "activations") == "at least 1.9 GiB"
    page = render(plan_of("+recipe=mixtral_8x7b_tp1_pp4_ep8"))
    assert line(page, "activations") == "at least 32.3 GiB on stage 0, forward passes in flight: 35"


def test_the_learning_rate_is_shown_with_the_steps_of_its_phases():
    page = render(plan_of())
    assert (
        line(page, "learning rate")
        == "0.00e+00 at the first step, 2.00e-03 after warm-up, 2.00e-04 at the last"
    )
    assert line(page, "phases") == "warm-up 20 steps, cosine decay 280 steps"
    page = render(plan_of("optimizer.lr_decay_steps=200"))
    assert line(page, "phases") == "warm-up 20 steps, cosine decay 180 steps, min_lr 100 steps"
    page = render(plan_of("optimizer.lr_decay_steps=400"))
    assert (
        line(page, "phases") == "warm-up 20 steps, cosine decay 280 steps; decay ends at step 400"
    )
    page = render(plan_of("trainer.max_steps=5"))
    assert page.startswith(
        "warning: optimizer.lr_warmup_steps = 20, but the run ends at trainer.max_steps = 5"
    )
    assert line(page, "learning rate") == "0.00e+00 at the first step, 4.00e-04 at the last"
    assert line(page, "phases") == "warm-up 5 steps"
    page = render(plan_of("optimizer.lr_decay_style=constant", "optimizer.lr_warmup_steps=0"))
    assert line(page, "learning rate") == "2.00e-03 at the first step, 2.00e-03 at the last"
    assert line(page, "phases") == "constant 300 steps"


def test_a_pipeline_names_the_stage_that_is_fullest():
    page = render(derived(RECIPE, "trainer.num_nodes=8", "parallel.pipeline_model_parallel_size=4"))
    assert "TP 1 x CP 1 x DP 16 x PP 4" in page
    assert "stage 3" in line(page, "state on a rank")
    assert "stage" not in line(render(plan_of(RECIPE)), "state on a rank")
