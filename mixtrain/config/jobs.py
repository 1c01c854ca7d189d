"""From a composed job of a command line to its plan: the same for everything that is typed. No torch."""

from __future__ import annotations

from mixtrain.config.choices import Mode
from mixtrain.config.compose import Composed
from mixtrain.config.contradictions import contradictions
from mixtrain.config.plan import Plan
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config
from mixtrain.system.rank_identity import Identity


def plan_of(job: Composed, problems: list[str], identity: Identity | None = None) -> Plan:
    """The plan, with what was changed of the recipe; a UserError after the `problems` of the words.

    A plan that is only printed is that of any machine: how many ranks somebody has started here is
    not asked.
    """
    problems = [*problems, *contradictions(job)]
    config = Config.from_hydra(job.tree, problems)
    recipe = job.recipe and (job.recipe.name, Config.from_hydra(job.recipe.tree))
    started = identity.world_size if identity and config.trainer.mode is not Mode.plan else None
    return make_plan(config, started, problems, recipe)
