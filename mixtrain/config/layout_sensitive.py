"""One table: settings whose result depends on the layout; they use one rank's data. No torch.

Rule: a row is measured (tests/proof/test_parity_limits.py). The plan warns about it, docs/parity.md
lists it, and the parity certificate leaves such layouts out and counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mixtrain.config.choices import Balancing
from mixtrain.config.layout import Layout
from mixtrain.config.schema import Config


class Limit(NamedTuple):
    """A setting and the sizes that change its result."""

    name: str
    axes: tuple[str, ...]  # sizes that change the result if they are above 1
    why: str
    applies: Callable[[Config], bool]
    warns: bool = True  # false if a user of the setting expects it


def _balancing(config: Config, kind: Balancing) -> bool:
    router = config.router
    pairs = dict(
        zip(router.moe_router_load_balancing_type, router.moe_aux_loss_coeff, strict=False)
    )
    return kind in pairs and (kind is Balancing.sinkhorn or pairs[kind] > 0)


def counts_over_a_step(config: Config) -> bool:
    """Return whether the router balances by token counts of all ranks, summed over microbatches.

    Layouts then give the same run if they have the same number of microbatches in a step, that is,
    the same micro_batch_size * DP.
    """
    return _balancing(config, Balancing.global_aux_loss)


def _has_capacity(config: Config) -> bool:
    return config.dispatcher.moe_expert_capacity_factor is not None


def _uses_one_microbatch(config: Config) -> bool:
    return _balancing(config, Balancing.aux_loss) or _has_capacity(config)


EVERY = ("TP", "CP", "PP", "EP", "ETP", "DP")
LIMITS = [
    Limit(
        "sinkhorn",
        ("TP", "CP"),
        "it balances the tokens of one rank",
        lambda config: _balancing(config, Balancing.sinkhorn),
    ),
    Limit(
        "dispatcher.moe_expert_capacity_factor",
        ("TP", "CP"),
        "it drops among the tokens of one rank",
        _has_capacity,
    ),
    Limit(
        "global_aux_loss",
        ("DP",),
        "combined with a setting that uses one rank's microbatch (aux_loss, a capacity)",
        lambda config: counts_over_a_step(config) and _uses_one_microbatch(config),
        warns=False,
    ),
    Limit(
        "router.moe_input_jitter_eps",
        ("TP", "CP", "DP"),
        "each rank has its own random stream",
        lambda config: bool(config.router.moe_input_jitter_eps),
        warns=False,
    ),
    Limit(
        "router.moe_router_force_load_balancing",
        EVERY,
        "each rank has its own random stream",
        lambda config: config.router.moe_router_force_load_balancing,
        warns=False,
    ),
]


def exceeded_limits(config: Config) -> list[tuple[Limit, dict[str, int]]]:
    """Return the limits that its layout exceeds, each with the sizes that exceed it."""
    sizes = Layout.of(config).sizes
    exceeded = []
    for limit in LIMITS:
        above_one = {axis: sizes[axis] for axis in limit.axes if sizes[axis] > 1}
        if above_one and limit.applies(config):
            exceeded.append((limit, above_one))
    return exceeded


def warnings(config: Config) -> list[str]:
    """Return a sentence for each exceeded limit that a user of the setting may not expect."""
    sentences = []
    for limit, sizes in exceeded_limits(config):
        if limit.warns:
            layout = " and ".join(f"{axis} {size}" for axis, size in sizes.items())
            sentences.append(
                f"{limit.name}: {limit.why}, so with {layout} it is another run than with 1"
                " (docs/parity.md)"
            )
    return sentences
