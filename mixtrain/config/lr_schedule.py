"""The learning rate of a step, and the phases of the schedule. No torch.

Rule: the numbers equal those of Megatron-Core's OptimizerParamScheduler;
tests/config/test_schedule.py compares them.
"""

from __future__ import annotations

import math

from mixtrain.config.choices import DecayStyle
from mixtrain.config.schema import Config, OptimizerConfig

REMAINING = {  # share of lr - min_lr that remains after a share of the decay
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (math.cos(math.pi * done) + 1) / 2,
    "exponential": lambda done: 2 * 0.5**done - 1,
    "minus_sqrt": lambda done: 1 - math.sqrt(done),
}


def is_valid(optimizer: OptimizerConfig) -> bool:
    """Return whether the phases of a resolved configuration follow one another."""
    stable = optimizer.lr_decay_steps - optimizer.lr_warmup_steps
    last = optimizer.lr_wsd_decay_steps if optimizer.lr_decay_style is DecayStyle.WSD else 1
    return last is not None and 0 < last <= stable


def rate(optimizer: OptimizerConfig, done: int) -> float:
    """Return the learning rate of the step after `done` steps, of a resolved configuration."""
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
    remaining = REMAINING[shape](max(0, done - start) / (end - start))
    return optimizer.min_lr + remaining * (optimizer.lr - optimizer.min_lr)


def phases(config: Config) -> list[tuple[str, int]]:
    """Return (name, steps) of the phases within the run, in order."""
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
    phase_steps = []
    begin = 0
    for name, end in bounds:
        if (end := min(end, steps)) > begin:
            phase_steps.append((name, end - begin))
            begin = end
    return phase_steps


def warnings(config: Config) -> list[str]:
    """Return a warning if the run ends before it reaches the full learning rate."""
    warmup = config.optimizer.lr_warmup_steps
    steps = config.trainer.max_steps
    if warmup < steps:
        return []
    return [
        f"optimizer.lr_warmup_steps = {warmup}, but the run ends at trainer.max_steps = {steps}:"
        f" no step has optimizer.lr = {config.optimizer.lr:.2e}, the last has"
        f" {rate(config.optimizer, steps - 1):.2e}"
    ]
