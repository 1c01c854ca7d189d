"""Rules about model.extra: a field that is given is one, fits, and does something. No torch."""

from __future__ import annotations

from difflib import get_close_matches

from mixtrain.config.extra_fields import CLASS_OF, NEEDS, VALUES, keys_of_their_own
from mixtrain.config.key_effects import show
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems
from mixtrain.config.transformer_fields import (
    UNKNOWN,
    takes,
    transformer_config_defaults,
    transformer_fields,
)

GROUP = "microbatch_group_size_per_vp_stage"


def extra_fields_are_fields(plan: Plan) -> Problems:
    for name, value in plan.config.model.extra.items():
        if wrong := _no_field(plan, name, value):
            yield f"model.extra.{name} {wrong}"


def _no_field(plan: Plan, name: str, value: object) -> str | None:
    """Why a field cannot be one of model.extra with that value, whatever it would do."""
    own = keys_of_their_own(plan)
    installed = transformer_config_defaults()
    if name in own:
        return f"has a key of its own; set {own[name]}"
    if name not in CLASS_OF:
        near = get_close_matches(name, [*CLASS_OF, *own], n=1, cutoff=0.7)
        hint = f"; did you mean {own.get(near[0], f'model.extra.{near[0]}')}?" if near else ""
        return f"is not a field of TransformerConfig{hint}"
    if installed is not None and name not in installed:
        return "is not a field of TransformerConfig in the installed megatron-core; leave it out"
    wanted = takes(name, value) if CLASS_OF[name][0] != "set" else None
    return f"= {show(value)} must be {wanted}" if wanted else None


def extra_fields_do_something(plan: Plan) -> Problems:
    itself = transformer_fields(plan.config, extra=False)
    for name, value in plan.config.model.extra.items():
        if _no_field(plan, name, value):
            continue  # said above
        (kind, why) = CLASS_OF[name]
        given = f"model.extra.{name} = {show(value)}"
        if kind == "set" or name in itself:
            to = f", to {show(itself[name])}" if name in itself else ""
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
            yield f"{given} needs {missing}, where alone it is read; {_instead(name)}"


def _missing(plan: Plan, needs: list[str]) -> str:
    """What a field needs and this configuration has not: rows of NEEDS, or another field of model.extra."""
    extra = plan.config.model.extra
    wanted = [NEEDS[need].words for need in needs if need in NEEDS and not NEEDS[need].holds(plan)]
    others = [need for need in needs if need not in NEEDS]
    wanted += [
        f"model.extra.{other}"
        for other in others
        if extra.get(other, _default(other)) == _default(other)
    ]
    return " and ".join(wanted)


def _default(name: str) -> object:
    return (transformer_config_defaults() or {}).get(name, UNKNOWN)


def _instead(name: str) -> str:
    return "leave it out" if _default(name) is UNKNOWN else f"use {show(_default(name))}"


def groups_of_microbatches_fit(plan: Plan) -> Problems:
    """As Megatron-Core's interleaved schedule wants them, in every step of a ramp-up."""
    stages = plan.config.parallel.pipeline_model_parallel_size
    each = plan.config.model.extra.get(GROUP)
    if type(each) is not int or not NEEDS["virtual"].holds(plan):
        return  # another rule's, or there are no chunks
    for count in sorted({plan.microbatches_of(batch) for batch in _batches(plan)}):
        if not stages <= each <= count or 0 < count % each < stages:
            yield (
                f"model.extra.{GROUP} = {each} must be from PP = {stages} to the {count}"
                f" microbatches of a step, and leave none or at least {stages} of them over; leave"
                " it out"
            )
            return


def _batches(plan: Plan) -> list[int]:
    """The sizes of a step, all those of a ramp-up too."""
    trainer = plan.config.trainer
    first, increment, _ = trainer.rampup_batch_size or (trainer.global_batch_size, 1, 1)
    return [*range(first, trainer.global_batch_size, max(increment, 1)), trainer.global_batch_size]


RULES = [extra_fields_are_fields, extra_fields_do_something, groups_of_microbatches_fit]
