"""The cross-field rules: what a Config must keep so that Megatron-Core trains what the user meant. No torch.

Rule: each rule is a function of the derived Plan that yields one sentence per breach, with the keys, both numbers and
the nearest legal value; RULES lists them all and every one has a test. Rules about this machine are in
launch/machine_checks.py.
"""

from __future__ import annotations

from mixtrain.config.plan import Plan
from mixtrain.config.rules import (
    data,
    experts,
    extra,
    implementation,
    launcher,
    layout,
    memory,
    paths,
    training,
    unread,
    upstream,
)

PARTS = (
    paths,
    layout,
    memory,
    implementation,
    experts,
    unread,
    training,
    extra,
    data,
    upstream,
    launcher,
)
RULES = [rule for part in PARTS for rule in part.RULES]


def broken_rules(plan: Plan) -> list[str]:
    """Every problem of every rule, in the order of RULES."""
    return [problem for rule in RULES for problem in rule(plan)]
