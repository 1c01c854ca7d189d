"""Refuse layouts that Megatron-Core computes incorrectly, unless acknowledged. No torch.

Rule: a row is measured and names the upstream file; tests/engine/test_upstream.py fails for a row
that no supported version needs.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from mixtrain.config.choices import Balancing, TransformerImpl
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems

KEY = "parallel.acknowledged_faults"


class UpstreamFault(NamedTuple):
    """A fault of Megatron-Core."""

    name: str
    before: tuple[int, int]  # the first version without it
    file: str
    wrong: str
    instead: str
    applies: Callable[[Plan], bool]  # whether a plan triggers it


def _experts_beside_tensor_ranks(plan: Plan) -> bool:
    layout = plan.layout
    engine = plan.config.model.transformer_impl is TransformerImpl.transformer_engine
    return engine and layout.tp > 1 and layout.etp != layout.tp and layout.ep == 1


def _per_token_auxiliary_loss(plan: Plan) -> bool:
    router = plan.config.router
    coefficients = dict(
        zip(router.moe_router_load_balancing_type, router.moe_aux_loss_coeff, strict=False)
    )
    if not plan.config.model.extra.get("calculate_per_token_loss"):
        return False
    if coefficients.get(Balancing.seq_aux_loss) and plan.config.trainer.micro_batch_size > 1:
        return True
    split = plan.layout.tp > 1 or plan.layout.cp > 1
    return split and bool(any(coefficients.values()) or router.moe_z_loss_coeff)


# fmt: off
FAULTS = [
    UpstreamFault(
        "expert_gradients_over_tp", (0, 19), "megatron/core/transformer/moe/experts.py",
        "with TP above 1, EP = 1 and another ETP the experts' gradients are never added up over"
        " the tensor ranks",
        "model.transformer_impl=torch, EP of 2 or more, or ETP = TP", _experts_beside_tensor_ranks),
    UpstreamFault(
        "per_token_auxiliary_loss", (0, 19), "megatron/core/transformer/moe/router.py",
        "calculate_per_token_loss divides auxiliary losses and the z-loss by TP*CP, seq_aux_loss"
        " by the micro batch",
        "model.extra.calculate_per_token_loss=false", _per_token_auxiliary_loss),
]
# fmt: on


def megatron_version() -> tuple[int, ...] | None:
    """Return (major, minor) of the installed Megatron-Core, without importing it, or None."""
    try:
        return tuple(int(number) for number in version("megatron-core").split(".")[:2])
    except PackageNotFoundError:
        return None


def triggered_faults(plan: Plan) -> list[UpstreamFault]:
    """Return the faults of the installed version that the plan triggers."""
    installed = megatron_version()
    return [
        fault for fault in FAULTS if installed and installed < fault.before and fault.applies(plan)
    ]


def upstream_faults_are_acknowledged(plan: Plan) -> Problems:
    acknowledged = plan.config.parallel.acknowledged_faults
    for fault in triggered_faults(plan):
        if fault.name not in acknowledged:
            installed = ".".join(map(str, megatron_version()))
            yield (
                f"megatron-core {installed}, {fault.file}: {fault.wrong}; use {fault.instead}, or"
                f" {KEY}=[{fault.name}] to run it anyway"
            )
    names = [fault.name for fault in FAULTS]
    for name in acknowledged:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            yield (
                f"{KEY} has {name}; {f'did you mean {near[0]}? ' if near else ''}the names are"
                f" {', '.join(names)}"
            )


RULES = [upstream_faults_are_acknowledged]
