"""router=balanced: the assignment against brute force, its bounds, gradient and layouts."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from composing import derived
from rank_workers import run_ranks  # its import makes Megatron-Core run on the CPU
from test_parity import EP, PP, TINY, assert_same, measure
from test_run import FINISHED, records, start

from mixtrain.engine import model, process_groups
from mixtrain.engine.layers import balanced_router
from mixtrain.engine.layers.balanced_router import assignment_margin, balanced_assignment
from mixtrain.training.measured_step import ChoiceMargin

BALANCED = "router=balanced"


def draw(seed: int, tokens: int, experts: int) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def assert_balanced(chosen: torch.Tensor, topk: int) -> None:
    load = chosen.sum(dim=0)
    assert chosen.dtype == torch.bool and (chosen.sum(dim=1) == topk).all()
    assert load.max() - load.min() <= 1


def sums_by_brute_force(scores: torch.Tensor, topk: int) -> list[float]:
    """The sums of all balanced maps, the largest first."""
    tokens, experts = scores.shape
    rows = [
        [(picked, sum(row[i] for i in picked)) for picked in combinations(range(experts), topk)]
        for row in scores.tolist()
    ]
    sums = []
    for choice in product(*rows):
        load = [0] * experts
        for picked, _ in choice:
            for expert in picked:
                load[expert] += 1
        if max(load) - min(load) <= 1:
            sums.append(sum(value for _, value in choice))
    return sorted(sums, reverse=True)


SIZES = [(6, 4, 2), (5, 4, 2), (7, 3, 1), (5, 4, 3), (2, 5, 2)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tokens, experts, topk", SIZES)
def test_the_sum_of_scores_is_the_largest_of_a_balanced_map(tokens, experts, topk, seed):
    scores = draw(seed, tokens, experts) + 2 * draw(seed + 100, 1, experts)
    chosen = balanced_assignment(scores, topk)
    assert_balanced(chosen, topk)
    best, following, *_ = sums_by_brute_force(scores, topk)
    assert scores[chosen].sum().item() == pytest.approx(best, abs=1e-5)
    assert assignment_margin(scores, chosen) == pytest.approx(best - following, abs=1e-5)


LARGE = {
    "top-2 of 8": (draw(0, 512, 8), 2),
    "tokens that 8 does not divide": (draw(1, 333, 8), 2),
    "all want the same expert": (draw(2, 256, 8) + 9 * torch.eye(8)[3], 2),
    "top-8 of 32": (draw(3, 256, 32) + draw(4, 1, 32), 8),
    "in bf16, with many ties": ((draw(5, 256, 8) + draw(6, 1, 8)).bfloat16(), 2),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_exchange_of_tokens_makes_the_sum_larger(name):
    """This proves that it is the largest: a better map differs by cycles of moves that gain."""
    scores, topk = LARGE[name]
    chosen = balanced_assignment(scores, topk)
    assert_balanced(chosen, topk)
    assert assignment_margin(scores, chosen) > -1e-5
    assert torch.equal(chosen, balanced_assignment(scores.clone(), topk))


HOSTILE = {
    "equal scores": torch.zeros(100, 8),
    "equal tokens": draw(0, 1, 8).expand(100, 8),
    "five kinds of tokens": draw(1, 5, 8)[torch.arange(203) % 5],
    "one line of experts": draw(2, 300, 1) * draw(3, 1, 16),
    "NaN": torch.full((50, 8), torch.nan),
    "some NaN and inf": draw(4, 50, 8).masked_fill(draw(5, 50, 8) > 1, torch.nan)
    + torch.where(draw(6, 50, 8) > 1, torch.inf, 0.0),
    "minus inf": draw(7, 50, 8).masked_fill(torch.arange(8) < 5, -torch.inf),
    "huge": draw(8, 50, 8) * 1e38,
    "tiny": draw(9, 50, 8) * 1e-38,
    "one token": draw(10, 1, 8),
    "no tokens": draw(11, 0, 8),
    "more experts than choices": draw(12, 3, 16),
}


@pytest.mark.parametrize("topk", [1, 2, 7])
@pytest.mark.parametrize("name", HOSTILE)
def test_scores_of_any_kind_are_balanced_and_the_same_again(name, topk):
    scores = HOSTILE[name]
    chosen = balanced_assignment(scores, topk)
    assert_balanced(chosen, topk)
    assert torch.equal(chosen, balanced_assignment(scores, topk))


def test_as_many_choices_as_experts_take_all():
    assert balanced_assignment(draw(0, 10, 4), 4).all()


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("rounds, paths", [(1, 0), (1, 1), (50, 0)])
def test_at_its_bounds_the_map_is_balanced_all_the_same(name, rounds, paths, monkeypatch):
    scores, topk = LARGE[name]
    best = scores[balanced_assignment(scores, topk)].double().sum()
    monkeypatch.setattr(balanced_router, "PRICE_ROUNDS", rounds)
    monkeypatch.setattr(balanced_router, "PATHS_PER_EXPERT", paths)
    chosen = balanced_assignment(scores, topk)
    assert_balanced(chosen, topk)
    assert scores[chosen].double().sum() <= best + 1e-4
    if rounds > 1:  # with good prices little is left to move directly
        spread = (scores.amax(dim=1) - scores.amin(dim=1)).mean()
        assert (best - scores[chosen].double().sum()) / chosen.sum() < 1e-2 * spread


def test_where_top_k_is_balanced_it_is_the_assignment():
    scores = torch.eye(8).repeat(4, 1) + 0.5 * torch.eye(8).roll(1, dims=1).repeat(4, 1)
    chosen = balanced_assignment(scores, 2)
    assert torch.equal(chosen, scores > 0)


def test_how_near_a_choice_was_is_seen_from_outside():
    scores = draw(0, 16, 4)
    with ChoiceMargin() as margin:
        chosen = balanced_assignment(scores, 2)
    assert torch.equal(chosen, balanced_assignment(scores, 2))
    assert margin.smallest == assignment_margin(scores, chosen) > 0


def routed(identity) -> None:
    """Weights, gradients and choices of the router, in training and out of it."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    alone = [*TINY, "parallel=ep1"]
    with process_groups.start(derived(*alone), identity):
        for words in ([], ["router.moe_router_pre_softmax=true"]):
            plan = derived(*alone, BALANCED, *words, "router.moe_router_topk_scaling_factor=2.5")
            config = model.transformer_config(plan)
            router = model.router_class(plan)(config, get_default_pg_collection())
            router.weight.data.copy_(draw(0, config.num_moe_experts, config.hidden_size) / 8)
            tokens = draw(1, 33, config.hidden_size)[:, None].requires_grad_()
            topk = TopKRouter(config, get_default_pg_collection()).eval()
            topk.load_state_dict(router.state_dict())

            outside = router.eval()(tokens)
            assert all(torch.equal(a, b) for a, b in zip(outside, topk(tokens), strict=True))

            weights, chosen = router.train()(tokens)
            assert_balanced(chosen, config.moe_router_topk)
            changed = (chosen & ~outside[1]).sum()
            assert router.changed_choices == changed > 0
            again = router(tokens)
            assert torch.equal(again[0], weights) and torch.equal(again[1], chosen)
            with torch.no_grad():  # as full recompute runs it first
                assert torch.equal(router(tokens)[0], weights)
            towards = draw(2, *weights.shape)
            (weights * towards).sum().backward()

            logits = tokens.detach()[:, 0] @ router.weight.detach().T
            logits.requires_grad_()
            best = chosen.nonzero()[:, 1].view(len(chosen), -1)
            if words:
                picked = logits.softmax(dim=1).gather(1, best)
            else:
                picked = logits.gather(1, best).softmax(dim=1)
            expected = torch.zeros_like(weights).scatter(1, best, 2.5 * picked)
            torch.testing.assert_close(weights, expected)
            (expected * towards).sum().backward()
            torch.testing.assert_close(router.weight.grad, logits.grad.T @ tokens.detach()[:, 0])


def test_the_weights_are_mixtrals_for_the_chosen_experts_with_their_gradient(tmp_path):
    run_ranks(1, routed, tmp_path)


LAYOUTS = {
    "EP2": [EP + "2"],
    "DP2": [EP + "1", "trainer.devices=2"],
    "PP2": [EP + "1", PP + "2"],
    "EP2xPP2, full recompute": [
        EP + "2",
        PP + "2",
        "trainer.recompute_granularity=full",
        "trainer.recompute_method=uniform",
        "trainer.recompute_num_layers=1",
    ],
}
SMALL = [BALANCED, "model.num_layers=2"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return measure([EP + "1", *SMALL], tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_rank_computes(name, one_rank, tmp_path):
    """A microbatch of a rank is one sequence at each of them."""
    here = measure([*LAYOUTS[name], *SMALL], tmp_path)
    assert_same(here, one_rank)
    assert here["held_out"] == pytest.approx(one_rank["held_out"], rel=1e-4)
    assert here["loads"] == [[[64] * 8] * 2] * 3


def test_a_run_logs_equal_loads_and_how_many_choices_were_changed(tmp_path):
    words = [BALANCED, EP + "2", "checkpoint=none", "trainer.max_steps=2"]
    directory, codes = start(tmp_path, *words)
    assert codes == [FINISHED, FINISHED]
    steps = [record for record in records(directory) if "lm_loss" in record]
    head, first, *_ = (
        (tmp_path / "ranks" / "rank_0.log").read_text().split("lm_loss")[1].splitlines()
    )
    assert head.endswith(" changed")
    assert first.endswith(f" {steps[0]['balanced_choices_changed']:.2%}")
    for record in steps:
        assert 0 < record["balanced_choices_changed"] < 1
        assert record["load_balancing_loss"] is None and "token_drop_rate" not in record
        assert all(set(layer) == {sum(layer) // 8} for layer in record["tokens_per_expert"])
    assert "router balanced" in (directory / "plan.txt").read_text()
