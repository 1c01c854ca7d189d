"""Where another layout is another run, and that this is the only reason. docs/parity.md has the table."""

from __future__ import annotations

import pytest
from test_parity import EP, PP, measure

DP2 = "trainer.devices=2"
GLOBAL = ["router=global_aux_loss", "router.moe_aux_loss_coeff=0.1"]
JITTER = ["router.moe_input_jitter_eps=0.1"]
FORCED = ["router=forced_balance"]


def differs(here: float, there: float) -> bool:
    return here != pytest.approx(there, rel=1e-5)


def test_the_global_auxiliary_loss_counts_over_data_parallel_ranks(tmp_path):
    """Its counts run over a step's microbatches: two ranks see in one what one rank sees in two."""
    one = measure([EP + "1", *GLOBAL], tmp_path / "one")
    two = measure([EP + "1", DP2, *GLOBAL], tmp_path / "two")
    assert one["losses"][0] == pytest.approx(two["losses"][0], rel=1e-6)  # forward: the same
    assert differs(one["balances"][0], two["balances"][0]) and differs(one["norms"][0], two["norms"][0])


def test_the_global_auxiliary_loss_is_the_same_at_the_same_data_parallel_size(tmp_path):
    plain = measure([EP + "1", DP2, *GLOBAL], tmp_path / "plain")
    for name, layout in {"EP2": [EP + "2"], "PP2": [EP + "1", PP + "2", "trainer.devices=4"]}.items():
        here = measure([*layout, *GLOBAL], tmp_path / name)
        assert here["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert here["norms"] == pytest.approx(plain["norms"], rel=1e-4)
        assert here["balances"][0] == pytest.approx(plain["balances"][0], rel=1e-5)


def test_nothing_but_its_coefficient_makes_the_global_auxiliary_loss_depend_on_the_layout(tmp_path):
    off = ["router=global_aux_loss", "router.moe_aux_loss_coeff=0"]
    one = measure([EP + "1", *off], tmp_path / "one")
    two = measure([EP + "1", DP2, *off], tmp_path / "two")
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["norms"][0] == pytest.approx(two["norms"][0], rel=1e-5)


def test_jitter_draws_a_number_a_rank(tmp_path):
    """Each rank has a random stream: other data-parallel sizes draw other numbers, expert parallelism does not."""
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
def test_forced_balance_is_the_same_again_at_the_same_layout(layout, tmp_path):
    assert measure([*layout, *FORCED], tmp_path / "a") == measure([*layout, *FORCED], tmp_path / "b")
