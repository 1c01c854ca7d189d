"""Make the plan of a composed job, for every command that takes overrides. No torch."""

from __future__ import annotations

from mixtrain.config.choices import Mode
from mixtrain.config.compose import ComposedJob
from mixtrain.config.contradictions import contradictions
from mixtrain.config.plan import Plan
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config
from mixtrain.system.rank_identity import Identity


def plan_of(job: ComposedJob, problems: list[str], identity: Identity | None = None) -> Plan:
    """Return the plan and its differences from the recipe. Raises UserError, `problems` first.

    A plan that is only printed does not depend on the number of ranks started on this machine.
    """
    problems = [*problems, *contradictions(job, job.conf)]
    config = Config.from_hydra(job.tree, problems)
    recipe = job.recipe and (job.recipe.name, Config.from_hydra(job.recipe.tree))
    started = identity.world_size if identity and config.trainer.mode is not Mode.plan else None
    return make_plan(config, started, problems, recipe)
