"""Refuse router keys that another key's value makes ineffective. No torch.

Rule: a row is true for every supported version. tests/config/test_unread.py runs the real router
with two values of each key: the results are bitwise equal for a row, and differ otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mixtrain.config.choices import Balancing, ScoreFunction
from mixtrain.config.key_effects import show, value_of
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems
from mixtrain.config.schema import Config


class Unread(NamedTuple):
    """A row: if `applies`, Megatron-Core does not read `keys`; `why` names the reason."""

    why: str
    applies: Callable[[Config], bool]
    keys: dict[str, object]  # key -> its neutral value, the only one allowed


def _sinkhorn(config: Config) -> bool:
    return Balancing.sinkhorn in config.router.moe_router_load_balancing_type


def _balanced(config: Config) -> bool:
    return Balancing.balanced in config.router.moe_router_load_balancing_type


# fmt: off
UNREAD = [
    Unread("router.moe_router_load_balancing_type = sinkhorn", _sinkhorn, {
        # sinkhorn's weights are softmax, or sigmoid for one expert a token
        "router.moe_router_score_function": "softmax",
        "router.moe_router_pre_softmax": False,  # always over all experts
        "router.moe_router_enable_expert_bias": False,
        "router.moe_router_bias_update_rate": 0.001,
        "router.moe_router_num_groups": None,
        "router.moe_router_group_topk": None,
        "router.moe_router_topk_scaling_factor": None,
    }),
    Unread("router.moe_router_load_balancing_type = balanced", _balanced, {
        "router.moe_router_score_function": "softmax",  # its weights are a softmax
        "router.moe_router_enable_expert_bias": False,
        "router.moe_router_bias_update_rate": 0.001,
        "router.moe_router_num_groups": None,
        "router.moe_router_group_topk": None,
    }),
    Unread("router.moe_router_score_function = sigmoid",
           lambda config: config.router.moe_router_score_function is ScoreFunction.sigmoid,
           {"router.moe_router_pre_softmax": False}),
    Unread("router.moe_router_enable_expert_bias = false",
           lambda config: not config.router.moe_router_enable_expert_bias,
           {"router.moe_router_bias_update_rate": 0.001}),
    Unread("dispatcher.moe_expert_capacity_factor = null",
           lambda config: config.dispatcher.moe_expert_capacity_factor is None,
           {"dispatcher.moe_token_drop_policy": "probs"}),
]
# fmt: on


def keys_are_read(plan: Plan) -> Problems:
    reported = set()  # one reason per key is enough
    for row in UNREAD:
        for key, neutral in row.keys.items():
            value = value_of(plan.config, key)
            if key not in reported and value != neutral and row.applies(plan.config):
                reported.add(key)
                yield f"{key} = {show(value)} is not read with {row.why}; use {show(neutral)}"


RULES = [keys_are_read]
