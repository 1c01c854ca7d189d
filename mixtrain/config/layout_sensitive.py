"""Switches for which another layout is another run: what they look at is what one rank sees. One table; no torch.

Rule: a row here is measured (test_parity_limits.py) and told: by the plan's warnings, by docs/parity.md, and by
the parity certificate, which leaves such layouts out and says how many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mixtrain.config.choices import Balancing
from mixtrain.config.schema import Config


class Limit(NamedTuple):
    """`axes`: the sizes that change the run if they are above 1; `always`: any other layout may."""

    name: str
    axes: tuple[str, ...]
    why: str
    applies: Callable[[Config], bool]
    warns: bool = True  # false where a user of the switch expects nothing else


def _balancing(config: Config, kind: Balancing) -> bool:
    router = config.router
    pairs = dict(
        zip(router.moe_router_load_balancing_type, router.moe_aux_loss_coeff, strict=False)
    )
    return kind in pairs and (kind is Balancing.sinkhorn or pairs[kind] > 0)


def counts_over_a_step(config: Config) -> bool:
    """Whether the router balances by counts that run over a step's microbatches, each that of all ranks together.

    A layout is then the same run where a step has as many microbatches: at the same micro_batch_size * DP.
    """
    return _balancing(config, Balancing.global_aux_loss)


def _looks_at_a_microbatch(config: Config) -> bool:
    return (
        _balancing(config, Balancing.aux_loss)
        or config.dispatcher.moe_expert_capacity_factor is not None
    )


EVERY = ("TP", "CP", "PP", "EP", "ETP", "DP")
# fmt: off
LIMITS = [
    Limit("sinkhorn", ("TP", "CP"), "it balances the tokens of one rank",
          lambda config: _balancing(config, Balancing.sinkhorn)),
    Limit("dispatcher.moe_expert_capacity_factor", ("TP", "CP"), "it drops among the tokens of one"
                                                                 " rank",
          lambda config: config.dispatcher.moe_expert_capacity_factor is not None),
    Limit("global_aux_loss", ("DP",), "beside what looks at one rank's microbatch (aux_loss, a"
                                      " capacity)",
          lambda config: counts_over_a_step(config) and _looks_at_a_microbatch(config), warns=False),
    Limit("router.moe_input_jitter_eps", ("TP", "CP", "DP"), "its random stream is a rank's",
          lambda config: bool(config.router.moe_input_jitter_eps), warns=False),
    Limit("router.moe_router_force_load_balancing", EVERY, "its random stream is a rank's",
          lambda config: config.router.moe_router_force_load_balancing, warns=False),
]
# fmt: on


def sizes_of(config: Config, data_parallel_size: int) -> dict[str, int]:
    """The sizes of a layout by the names that LIMITS uses."""
    parallel = config.parallel
    return {
        "TP": parallel.tensor_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": data_parallel_size,
    }


def broken(config: Config, data_parallel_size: int) -> list[tuple[Limit, dict[str, int]]]:
    """The limits that this layout is beyond, each with the sizes that are the reason."""
    sizes = sizes_of(config, data_parallel_size)
    beyond = [
        (limit, {axis: sizes[axis] for axis in limit.axes if sizes[axis] > 1}) for limit in LIMITS
    ]
    return [(limit, reasons) for limit, reasons in beyond if reasons and limit.applies(config)]


def warnings(config: Config, data_parallel_size: int) -> list[str]:
    """A sentence for each limit that a user of the switch may not expect."""
    found = [
        (limit, reasons) for limit, reasons in broken(config, data_parallel_size) if limit.warns
    ]
    return [
        f"{limit.name}: {limit.why}, so with"
        f" {' and '.join(f'{axis} {size}' for axis, size in reasons.items())} it is another run"
        " than with 1 (docs/parity.md)"
        for limit, reasons in found
    ]
