"""Keys of the router that nothing reads under another key's value: refused where they are set. No torch.

Rule: a row holds for every supported version's source, and test_unread.py runs the real router with two values
of each key: what a row covers computes the same to the bit, what none covers does not.
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
    """`keys` are not read where `applies`, because of what `why` names; {key: the value that asks for nothing}."""

    why: str
    applies: Callable[[Config], bool]
    keys: dict[str, object]


def _sinkhorn(config: Config) -> bool:
    return Balancing.sinkhorn in config.router.moe_router_load_balancing_type


def _balanced(config: Config) -> bool:
    return Balancing.balanced in config.router.moe_router_load_balancing_type


# fmt: off
UNREAD = [
    Unread("router.moe_router_load_balancing_type = sinkhorn", _sinkhorn, {
        # its weights are softmax, or sigmoid for one expert a token
        "router.moe_router_score_function": "softmax",
        "router.moe_router_pre_softmax": False,  # over all experts, whatever this says
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
    said = set()  # of two reasons the first is enough
    for row in UNREAD:
        for key, nothing in row.keys.items():
            value = value_of(plan.config, key)
            if key not in said and value != nothing and row.applies(plan.config):
                said.add(key)
                yield f"{key} = {show(value)} is not read with {row.why}; use {show(nothing)}"


RULES = [keys_are_read]
