"""The learning rate of a step, and the phases of its schedule. No torch.

Rule: the same numbers as Megatron-Core's OptimizerParamScheduler, which
tests/config/test_schedule.py holds it against.
"""

from __future__ import annotations

import math

from mixtrain.config.choices import DecayStyle
from mixtrain.config.schema import Config, OptimizerConfig

LEFT = {  # of the rate above the lowest, by the part of the decay that is done
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (math.cos(math.pi * done) + 1) / 2,
    "exponential": lambda done: 2 * 0.5**done - 1,
    "minus_sqrt": lambda done: 1 - math.sqrt(done),
}


def is_one(optimizer: OptimizerConfig) -> bool:
    """Whether a resolved configuration, of whatever source, has a schedule: its phases follow one another."""
    stable = optimizer.lr_decay_steps - optimizer.lr_warmup_steps
    last = optimizer.lr_wsd_decay_steps if optimizer.lr_decay_style is DecayStyle.WSD else 1
    return last is not None and 0 < last <= stable


def rate(optimizer: OptimizerConfig, done: int) -> float:
    """The learning rate of the step after `done` ones, of a resolved configuration."""
    warmup = optimizer.lr_warmup_steps
    end = optimizer.lr_decay_steps
    style = optimizer.lr_decay_style
    if warmup and done <= warmup:
        return optimizer.lr * done / warmup
    if style is DecayStyle.constant:
        return optimizer.lr
    if done > end:
        return optimizer.min_lr
    if style is DecayStyle["inverse-square-root"]:
        return max(optimizer.min_lr, optimizer.lr * math.sqrt(max(warmup, 1) / max(done, 1)))
    start = warmup
    shape = style.name
    if style is DecayStyle.WSD:
        start = end - optimizer.lr_wsd_decay_steps
        shape = optimizer.lr_wsd_decay_style.name
    return optimizer.min_lr + LEFT[shape](max(0, done - start) / (end - start)) * (
        optimizer.lr - optimizer.min_lr
    )


def phases(config: Config) -> list[tuple[str, int]]:
    """(name, steps) of the schedule's phases that the run goes through, in their order."""
    optimizer = config.optimizer
    steps = config.trainer.max_steps
    warmup = optimizer.lr_warmup_steps
    end = optimizer.lr_decay_steps
    style = optimizer.lr_decay_style
    if style is DecayStyle.constant:
        bounds = [("warm-up", warmup), ("constant", steps)]
    elif style is DecayStyle.WSD:
        anneal = f"{optimizer.lr_wsd_decay_style.name} decay"
        stable = end - optimizer.lr_wsd_decay_steps
        bounds = [("warm-up", warmup), ("constant", stable), (anneal, end), ("min_lr", steps)]
    else:
        bounds = [("warm-up", warmup), (f"{style.name} decay", end), ("min_lr", steps)]
    found = []
    before = 0
    for name, until in bounds:
        if (until := min(until, steps)) > before:
            found.append((name, until - before))
            before = until
    return found


def warnings(config: Config) -> list[str]:
    """Where the run does not come to the rate that it was given."""
    warmup = config.optimizer.lr_warmup_steps
    steps = config.trainer.max_steps
    if warmup < steps:
        return []
    return [
        f"optimizer.lr_warmup_steps = {warmup}, but the run ends at trainer.max_steps = {steps}:"
        f" no step has optimizer.lr = {config.optimizer.lr:.2e}, the last one has"
        f" {rate(config.optimizer, steps - 1):.2e}"
    ]
