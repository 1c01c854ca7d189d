"""From a Config to the Plan of a run: every derived number, every rule, and what differs from the recipe. No torch."""

from __future__ import annotations

from dataclasses import replace

from mixtrain.config.key_effects import EXECUTION, MATHEMATICS, changes
from mixtrain.config.plan import Plan, derive, resolve
from mixtrain.config.rules import broken_rules
from mixtrain.config.schema import Config
from mixtrain.errors import UserError


def make_plan(
    config: Config,
    world_size: int | None = None,
    known: list[str] | None = None,
    recipe: tuple[str, Config] | None = None,
) -> Plan:
    """The Plan of a Config; a UserError lists every rule it breaks, after the problems that are `known` already.

    `world_size`: the ranks a launcher has started, if one has. `recipe`: the name of the recipe that the configuration
    was made from, and its own configuration, to tell what was changed.
    """
    plan = derive(resolve(config, world_size))
    if problems := [*(known or []), *broken_rules(plan)]:
        raise UserError(*problems)
    if recipe is None:
        return plan
    name = recipe[0]
    changed = changes(recipe[1], config)
    return replace(
        plan,
        recipe=name,
        changed_mathematics=tuple(changed[MATHEMATICS]),
        changed_execution=tuple(changed[EXECUTION]),
    )
