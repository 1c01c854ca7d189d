"""Rules across keys: conditions on a Config for Megatron-Core to train what the user asked for.

Rule: a rule is a function of the derived Plan that yields one sentence per violation, with the
keys, both numbers and the nearest legal value. RULES lists all rules; each has a test. Rules about
this machine are in launch/machine_checks.py. No torch.
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

MODULES = (
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
RULES = [rule for module in MODULES for rule in module.RULES]


def broken_rules(plan: Plan) -> list[str]:
    """Return every violation, in the order of RULES."""
    return [problem for rule in RULES for problem in rule(plan)]
