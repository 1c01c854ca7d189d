"""Make the Plan of a Config: derive the numbers, check the rules, compare the recipe. No torch."""

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
    """Return the Plan of a Config. Raises UserError: the `known` problems, then violated rules.

    world_size: the ranks that a launcher has started, if any. recipe: name and own configuration of
    the recipe behind `config`, to find the changes.
    """
    plan = derive(resolve(config, world_size))
    if problems := [*(known or []), *broken_rules(plan)]:
        raise UserError(*problems)
    if recipe is None:
        return plan
    name, recipe_config = recipe
    changed = changes(recipe_config, config)
    return replace(
        plan,
        recipe=name,
        changed_mathematics=tuple(changed[MATHEMATICS]),
        changed_execution=tuple(changed[EXECUTION]),
    )
