"""Rules about model.extra: its fields exist, their values fit and have an effect. No torch."""

from __future__ import annotations

from difflib import get_close_matches

from mixtrain.config.extra_fields import CLASS_OF, NEEDS, VALUES, dedicated_keys
from mixtrain.config.key_effects import show
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems
from mixtrain.config.transformer_fields import (
    UNKNOWN,
    transformer_config_defaults,
    transformer_fields,
    wrong_type,
)

GROUP = "microbatch_group_size_per_vp_stage"


def extra_fields_are_fields(plan: Plan) -> Problems:
    for name, value in plan.config.model.extra.items():
        if wrong := _field_problem(plan, name, value):
            yield f"model.extra.{name} {wrong}"


def _field_problem(plan: Plan, name: str, value: object) -> str | None:
    """Return why model.extra cannot have this field and value, whatever its effect, or None."""
    dedicated = dedicated_keys(plan)
    installed = transformer_config_defaults()
    if name in dedicated:
        return f"has a key of its own; set {dedicated[name]}"
    if name not in CLASS_OF:
        near = get_close_matches(name, [*CLASS_OF, *dedicated], n=1, cutoff=0.7)
        hint = f"; did you mean {dedicated.get(near[0], f'model.extra.{near[0]}')}?" if near else ""
        return f"is not a field of TransformerConfig{hint}"
    if installed is not None and name not in installed:
        return "is not a field of TransformerConfig in the installed megatron-core; leave it out"
    expected = wrong_type(name, value) if CLASS_OF[name][0] != "set" else None
    return f"= {show(value)} must be {expected}" if expected else None


def extra_fields_do_something(plan: Plan) -> Problems:
    set_by_mixtrain = transformer_fields(plan.config, extra=False)
    for name, value in plan.config.model.extra.items():
        if _field_problem(plan, name, value):
            continue  # the rule above reports it
        (kind, why) = CLASS_OF[name]
        given = f"model.extra.{name} = {show(value)}"
        if kind == "set" or name in set_by_mixtrain:
            to = f", to {show(set_by_mixtrain[name])}" if name in set_by_mixtrain else ""
            yield (
                f"model.extra.{name}: mixtrain sets this field itself{to}"
                f" ({why if kind == 'set' else 'the layout'})"
            )
        elif value == _default(name):
            continue
        elif kind == "unread":
            yield f"{given} changes nothing: {why}; {_instead(name)}"
        elif kind == "unsupported":
            yield f"{given} is not supported: {why}; {_instead(name)}"
        elif VALUES.get(name, (None,))[0] == value:
            yield f"{given} is not supported: {VALUES[name][1]}; {_instead(name)}"
        elif missing := _missing(plan, why.split()):
            yield f"{given} is read only with {missing}; {_instead(name)}"


def _missing(plan: Plan, needs: list[str]) -> str:
    """Return the conditions that a field needs and the plan does not meet, as text."""
    extra = plan.config.model.extra
    missing = []
    for need in needs:
        if need not in NEEDS:
            if extra.get(need, _default(need)) == _default(need):
                missing.append(f"model.extra.{need}")
        elif not NEEDS[need].holds(plan):
            missing.append(NEEDS[need].condition)
    return " and ".join(missing)


def _default(name: str) -> object:
    return (transformer_config_defaults() or {}).get(name, UNKNOWN)


def _instead(name: str) -> str:
    return "leave it out" if _default(name) is UNKNOWN else f"use {show(_default(name))}"


def microbatch_groups_fit(plan: Plan) -> Problems:
    """Check Megatron-Core's limits of the interleaved schedule for every batch of a ramp-up."""
    stages = plan.config.parallel.pipeline_model_parallel_size
    size = plan.config.model.extra.get(GROUP)
    if type(size) is not int or not NEEDS["virtual"].holds(plan):
        return  # another rule reports it, or there are no chunks
    for count in sorted({plan.microbatches_of(batch) for batch in _batches(plan)}):
        if not stages <= size <= count or 0 < count % size < stages:
            yield (
                f"model.extra.{GROUP} = {size} must be from PP = {stages} to the {count}"
                f" microbatches of a step, with a remainder of 0 or at least {stages}; leave it out"
            )
            return


def _batches(plan: Plan) -> list[int]:
    """Return all global batch sizes of the run, including those of a ramp-up."""
    trainer = plan.config.trainer
    first, increment, _ = trainer.rampup_batch_size or (trainer.global_batch_size, 1, 1)
    return [*range(first, trainer.global_batch_size, max(increment, 1)), trainer.global_batch_size]


RULES = [extra_fields_are_fields, extra_fields_do_something, microbatch_groups_fit]
