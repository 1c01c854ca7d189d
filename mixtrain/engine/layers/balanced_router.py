"""A router that gives every expert its share of a rank's microbatch while training.

As in BASE layers (Lewis et al. 2021). Rule: the assignment is a function of the logits alone, the
same to the bit when a layer is recomputed.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch.overrides import handle_torch_function, has_torch_function_unary

# Scores become whole numbers held in float64, so that every sum below is exact:
SCORE_BITS = 28  # a token's scores are rounded to this part of the largest spread of any token's
TIE_BITS = 16  # below that, a fixed number for each token and expert decides between equal scores
PRICE_ROUNDS = 50  # at most, in search of the experts' prices
DAMPING = 0.8  # all experts change their price at once: by less than each alone would
PATHS_PER_EXPERT = 2  # at most so many times the experts, exact moves; then direct ones
NEVER = -torch.inf


class BalancedRouter(TopKRouter):
    """Balanced choices while training, top-k otherwise, with Mixtral's weights for the chosen."""

    changed_choices: torch.Tensor  # of the last call while training: choices that are not top-k's

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [s, b, experts] -> the weights and the bool map, both [s * b, experts]."""
        if not self.training:
            return super().routing(logits, padding_mask)
        logits = self.apply_z_loss(logits.view(-1, self.config.num_moe_experts))
        with torch.no_grad():
            chosen = balanced_assignment(logits, self.topk)
            self.changed_choices = (chosen & ~_best(logits, self.topk)).sum()
        if self.config.moe_router_pre_softmax:
            weights = logits.softmax(dim=-1, dtype=torch.float32) * chosen
        else:
            weights = logits.masked_fill(~chosen, NEVER).softmax(dim=-1, dtype=torch.float32)
        # upstream's precision: fp32, then that of the logits
        weights = weights.type_as(logits) * (self.config.moe_router_topk_scaling_factor or 1.0)
        return weights, chosen


def balanced_assignment(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Return the bool map [tokens, experts] with equal loads and the largest sum of scores.

    Every token has `topk` experts, and loads differ by at most one. The sum is the largest within
    tokens * topk * spread * 2**-27, where spread is the largest difference between two scores of
    one token. If the search reaches a bound (few distinct tokens, very many experts), the loads
    are still equal, but the sum is no longer the largest. A score that is not finite counts as the
    nearest finite one, NaN as the lowest.

    Three stages. A search for prices of the experts with which top-k of (score - price) is nearly
    balanced: such a choice has the largest sum for its loads. Then single tokens move from an
    expert with too many to one with too few, each along the best path over other experts, which
    keeps the sum the largest (successive shortest paths). At the bound the rest moves directly.
    """
    if has_torch_function_unary(scores):  # training/measured_step.py asks how near a choice was
        return handle_torch_function(balanced_assignment, (scores,), scores, topk)
    tokens, experts = scores.shape
    if topk == experts or not tokens:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = _whole_numbers(scores)
    prices = _prices(scores, topk)
    chosen = _best(scores - prices, topk)
    share = -(-tokens * topk // experts)
    spare = share * experts - tokens * topk
    if spare:  # a token without preferences takes the places that are over, at most one an expert
        scores = torch.cat([scores, torch.zeros_like(scores[:1])])
        chosen = torch.cat([chosen, _best(-prices[None], spare)])
    # from here on [experts, tokens]
    scores = scores.T.contiguous()
    chosen = chosen.T.contiguous()
    _move_along_paths(scores, chosen, share)
    _move_directly(scores, chosen, share)
    return chosen[:, :tokens].T.contiguous()


def assignment_margin(scores: torch.Tensor, chosen: torch.Tensor) -> float:
    """Return by how much the sum of the next best balanced map is smaller; inf without another."""
    load = chosen.sum(dim=0)
    share = load.amax()
    scores = torch.cat([scores.double(), scores.new_zeros(1, len(load))])
    chosen = torch.cat([chosen, (load < share)[None]])
    loss = -_best_moves(scores.T.contiguous(), chosen.T.contiguous())[0]
    for expert in range(len(loss)):  # of the best path from each expert to each
        loss = torch.minimum(loss, loss[:, expert, None] + loss[expert])
    return loss.diagonal().amin().item()


def _whole_numbers(scores: torch.Tensor) -> torch.Tensor:
    """Return scores as whole numbers in float64, relative to the token's best, ties broken."""
    scores = scores.double()
    finite = scores[scores.isfinite()]
    low, high = finite.aminmax() if len(finite) else (scores.new_zeros(()),) * 2
    scores = torch.where(scores.isfinite(), scores, torch.where(scores == torch.inf, high, low))
    scores = scores - scores.amax(dim=1, keepdim=True)
    spread = -scores.amin()
    unit = torch.where(spread > 0, spread, 1.0) / 2**SCORE_BITS
    token = torch.arange(1, len(scores) + 1, device=scores.device)
    odd = 2 * torch.arange(scores.shape[1], device=scores.device) + 1
    ties = token[:, None] * (40503 * odd) % 2**TIE_BITS
    return (scores / unit).round() * 2**TIE_BITS + ties


def _best(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """The map of each row's `topk` largest."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(topk).indices, True)


def _prices(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Return the prices [experts] with the fewest choices beyond an expert's share."""
    tokens, experts = scores.shape
    share = -(-tokens * topk // experts)
    prices = scores.new_zeros(experts)
    fewest, best = tokens * topk, prices
    for _ in range(PRICE_ROUNDS):
        values = scores - prices
        top = values.topk(topk + 1).values
        inside = values >= top[:, topk - 1 : topk]
        beyond = int((inside.sum(dim=0) - share).clamp(min=0).sum())
        if beyond < fewest:
            fewest, best = beyond, prices
        if beyond <= experts // 8:
            break
        # the price at which a token would just take the expert; that of an expert's share of tokens
        limit = scores - torch.where(inside, top[:, topk:], top[:, topk - 1 : topk])
        highest = limit.T.contiguous().topk(min(share + 1, tokens)).values
        wanted = (highest[:, share - 1] + highest[:, -1]) / 2
        prices = (prices + DAMPING * (wanted - prices)).round()
        prices = prices - prices.amin()
    return best


def _move_along_paths(scores: torch.Tensor, chosen: torch.Tensor, share: int) -> None:
    """Move tokens until every expert has its share or the bound is met; in place."""
    experts = len(scores)
    gains = None
    for _ in range(PATHS_PER_EXPERT * experts):
        load = chosen.sum(dim=1)
        if bool((load == share).all()):
            return
        if gains is None:
            gains, movers = _best_moves(scores, chosen)
        path = _best_path(gains, load > share, load < share)
        if path is None:
            return
        source, target = path[:-1], path[1:]
        moved = movers[source, target]
        chosen[source, moved] = False
        chosen[target, moved] = True
        _update_moves(scores, chosen, gains, movers, moved)


def _best_moves(scores: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[from, to]: the most that the move of one token adds to the sum, and which token it is."""
    experts = len(scores)
    gains = scores.new_full((experts, experts), NEVER)
    movers = torch.zeros_like(gains, dtype=torch.long)
    for source in range(experts):
        holders = chosen[source].nonzero().flatten()
        if len(holders):
            gain = scores[:, holders] - scores[source, holders]
            gains[source], best = gain.masked_fill_(chosen[:, holders], NEVER).max(dim=1)
            movers[source] = holders[best]
    return gains, movers


def _update_moves(
    scores: torch.Tensor,
    chosen: torch.Tensor,
    gains: torch.Tensor,
    movers: torch.Tensor,
    moved: torch.Tensor,
) -> None:
    """After the move of tokens: what _best_moves would find, in place."""
    # moves that were best for one of them
    source, target = torch.isin(movers, moved).nonzero(as_tuple=True)
    gain = (scores[target] - scores[source]).masked_fill_(~chosen[source] | chosen[target], NEVER)
    gains[source, target], movers[source, target] = gain.max(dim=1)
    # moves that are now best for one of them
    own, holds = scores[:, moved], chosen[:, moved]
    gain, best = (
        (own[None] - own[:, None]).masked_fill_(~holds[:, None] | holds[None], NEVER).max(dim=2)
    )
    better = gain > gains
    gains[better] = gain[better]
    movers[better] = moved[best[better]]


def _best_path(gains: torch.Tensor, over: torch.Tensor, under: torch.Tensor) -> torch.Tensor | None:
    """Return the path of experts from `over` to `under` with the largest sum (Bellman-Ford).

    None where sums are rounded, beyond 512 experts, and no path is the best one.
    """
    experts = len(gains)
    total = torch.where(over, 0.0, NEVER).to(gains)
    before = torch.full_like(over, -1, dtype=torch.long)
    for _ in range(experts):
        reached, source = (total[:, None] + gains).max(dim=0)
        better = reached > total
        if not bool(better.any()):
            break
        total = torch.where(better, reached, total)
        before = torch.where(better, source, before)
    else:
        return None
    expert = int(torch.where(under, total, NEVER).argmax())
    steps = before.tolist()
    path = [expert]
    while steps[expert] >= 0:
        expert = steps[expert]
        path.append(expert)
    return torch.tensor(path[::-1], device=gains.device)


def _move_directly(scores: torch.Tensor, chosen: torch.Tensor, share: int) -> None:
    """Move tokens from the experts with the most to those with the fewest; in place.

    The first always has enough tokens that the second lacks. Each turn balances one of the two.
    """
    beyond = (chosen.sum(dim=1) - share).tolist()
    while any(beyond):
        source = beyond.index(max(beyond))
        target = beyond.index(min(beyond))
        count = min(beyond[source], -beyond[target])
        gain = scores[target] - scores[source]
        moved = gain.masked_fill(~chosen[source] | chosen[target], NEVER).topk(count).indices
        chosen[source, moved] = False
        chosen[target, moved] = True
        beyond[source] -= count
        beyond[target] += count
