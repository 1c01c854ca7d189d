"""Settings whose result depends on the layout, and that each is the only reason.

docs/parity.md has the table.
"""

from __future__ import annotations

import pytest
from composing import plan_of
from test_parity import CP, EP, PP, TINY, TP, measure

from mixtrain.config import layout_sensitive

DP2 = "trainer.devices=2"
GLOBAL = ["router=global_aux_loss", "router.moe_aux_loss_coeff=0.1"]
JITTER = ["router.moe_input_jitter_eps=0.1"]
FORCED = ["router=forced_balance"]


def differs(here: float, there: float) -> bool:
    return here != pytest.approx(there, rel=1e-5)


MICRO = "trainer.micro_batch_size="
SPLIT_BY_DATA = {"DP2": ([EP + "1", DP2], 2), "EP2xDP2": ([EP + "2", "trainer.devices=4"], 4)}


def test_the_global_auxiliary_loss_counts_over_the_microbatches_of_a_step(tmp_path):
    """With two ranks a step has half as many microbatches, each of twice as many tokens."""
    one = measure([EP + "1", *GLOBAL], tmp_path / "one")
    two = measure([EP + "1", DP2, *GLOBAL], tmp_path / "two")
    assert one["losses"][0] == pytest.approx(two["losses"][0], rel=1e-6)  # forward: the same
    assert differs(one["balances"][0], two["balances"][0]) and differs(
        one["norms"][0], two["norms"][0]
    )


@pytest.mark.parametrize("layout", SPLIT_BY_DATA)
@pytest.mark.parametrize("router", ["global_aux_loss", "combined"])
def test_the_global_auxiliary_loss_weighs_the_same_at_every_data_parallel_size(
    router, layout, tmp_path
):
    """With the same number of microbatches per step.

    At a coefficient of 1 the auxiliary loss dominates the gradient norm.
    """
    coefficient = "1" if router == "global_aux_loss" else "[1,0.5]"
    words = [f"router={router}", f"router.moe_aux_loss_coeff={coefficient}"]
    split, parts = SPLIT_BY_DATA[layout]
    one = measure([EP + "1", MICRO + "4", *words], tmp_path / "one")
    here = measure([*split, MICRO + str(4 // parts), *words], tmp_path / "here")
    assert here["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert here["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert here["balances"][0] == pytest.approx(one["balances"][0], rel=1e-5)
    assert here["loads"][0] == one["loads"][0]


@pytest.mark.long
def test_the_global_auxiliary_loss_is_the_same_at_the_same_data_parallel_size(tmp_path):
    plain = measure([EP + "1", DP2, *GLOBAL], tmp_path / "plain")
    for name, layout in {
        "EP2": [EP + "2"],
        "PP2": [EP + "1", PP + "2", "trainer.devices=4"],
    }.items():
        here = measure([*layout, *GLOBAL], tmp_path / name)
        assert here["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert here["norms"] == pytest.approx(plain["norms"], rel=1e-4)
        assert here["balances"][0] == pytest.approx(plain["balances"][0], rel=1e-5)


@pytest.mark.long
def test_nothing_but_its_coefficient_makes_the_global_auxiliary_loss_depend_on_the_layout(tmp_path):
    off = ["router=global_aux_loss", "router.moe_aux_loss_coeff=0"]
    one = measure([EP + "1", *off], tmp_path / "one")
    two = measure([EP + "1", DP2, *off], tmp_path / "two")
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["norms"][0] == pytest.approx(two["norms"][0], rel=1e-5)


def test_jitter_draws_a_number_a_rank(tmp_path):
    """Each rank has a random stream: numbers depend on the data-parallel size, not on EP."""
    one = measure([EP + "1", *JITTER], tmp_path / "one")
    two = measure([EP + "1", DP2, *JITTER], tmp_path / "two")
    experts = measure([EP + "2", *JITTER], tmp_path / "experts")
    assert one["losses"][0] != two["losses"][0] and one["norms"][0] != two["norms"][0]
    assert one["losses"][0] == pytest.approx(two["losses"][0], rel=1e-2)  # noise, and small
    assert experts["losses"] == pytest.approx(two["losses"], rel=1e-5)


def test_forced_balance_draws_experts_by_rank_and_evenly(tmp_path):
    one = measure([EP + "1", *FORCED], tmp_path / "one")
    two = measure([EP + "2", *FORCED], tmp_path / "two")
    assert one["loads"][0] != two["loads"][0] and one["losses"][0] != two["losses"][0]
    for figures in (one, two):
        for layer in figures["loads"][0]:
            assert sum(layer) == 2 * 8 * 32 and max(layer) < 1.6 * sum(layer) / len(layer)


@pytest.mark.parametrize("layout", [[EP + "1"], [EP + "2"]])
@pytest.mark.long
def test_forced_balance_is_the_same_again_at_the_same_layout(layout, tmp_path):
    assert measure([*layout, *FORCED], tmp_path / "a") == measure(
        [*layout, *FORCED], tmp_path / "b"
    )


# Under tensor parallelism (in the router) and context parallelism a rank sees half of a sequence.
HALVES = {"TP2": [EP + "1", *TP], "CP2": [EP + "1", CP]}
CAPACITY = ["dispatcher=drop", "dispatcher.moe_expert_capacity_factor=0.75"]


@pytest.mark.parametrize("layout", HALVES)
@pytest.mark.parametrize("switch", [["router=sinkhorn"], CAPACITY], ids=["sinkhorn", "capacity"])
@pytest.mark.long
def test_what_balances_or_drops_looks_at_the_tokens_of_one_rank(switch, layout, tmp_path):
    one = measure([EP + "1", *switch], tmp_path / "one")
    here = measure([*HALVES[layout], *switch], tmp_path / "here")
    assert one["loads"][0] != here["loads"][0] and one["losses"][0] != pytest.approx(
        here["losses"][0], rel=5e-7
    )
    # a different choice of experts, nothing else
    assert one["losses"][0] == pytest.approx(here["losses"][0], rel=1e-2)
    assert layout_sensitive.exceeded_limits(plan_of(*TINY, *HALVES[layout], *switch).config)


@pytest.mark.long
def test_the_global_auxiliary_loss_is_the_same_over_tensor_and_context_ranks(tmp_path):
    one = measure([EP + "1", *GLOBAL], tmp_path / "one")
    for name, layout in HALVES.items():
        here = measure([*layout, *GLOBAL], tmp_path / name)
        assert here["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert here["norms"][0] == pytest.approx(one["norms"][0], rel=1e-5)


def test_the_plan_tells_what_depends_on_its_layout_and_only_that():
    def told(*words: str) -> list[str]:
        return [text for text in plan_of(*TINY, *words).warnings if "another run" in text]

    (text,) = told(*HALVES["TP2"], "router=sinkhorn")
    assert (
        "sinkhorn: it balances the tokens of one rank, so with TP 2 it is another run than with 1"
        in text
    )
    (text,) = told(*HALVES["CP2"], *CAPACITY)
    assert (
        "dispatcher.moe_expert_capacity_factor: it drops among the tokens of one rank, so with CP 2"
        in text
    )
    assert (
        told(*HALVES["TP2"])
        == told(EP + "2", "router=sinkhorn")
        == told(EP + "2", DP2, *JITTER)
        == []
    )


@pytest.mark.parametrize("limit", layout_sensitive.LIMITS, ids=lambda limit: limit.name)
def test_a_limit_is_for_its_switch_alone(limit):
    words = {
        "sinkhorn": ["router=sinkhorn"],
        "dispatcher.moe_expert_capacity_factor": CAPACITY,
        "global_aux_loss": [
            "router.moe_router_load_balancing_type=[global_aux_loss,aux_loss]",
            "router.moe_aux_loss_coeff=[0.1,0.1]",
        ],
        "router.moe_input_jitter_eps": JITTER,
        "router.moe_router_force_load_balancing": FORCED,
    }[limit.name]
    assert not limit.applies(plan_of(*TINY, EP + "1").config)
    config = plan_of(*TINY, EP + "1", *words).config
    assert [other.name for other in layout_sensitive.LIMITS if other.applies(config)] == [
        limit.name
    ]
    assert layout_sensitive.exceeded_limits(config) == []  # one rank is within every limit
