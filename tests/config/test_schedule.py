"""Learning rates, weight decay and batch sizes of a run, step by step, against formulas written out
here.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from composing import config_of, derived, plan_of
from megatron.core import num_microbatches_calculator
from omegaconf import OmegaConf
from rank_workers import run_ranks
from test_parity import EP, PLAIN, TINY

from mixtrain.checkpoint.state import RunState
from mixtrain.config.lr_schedule import phases, rate
from mixtrain.config.plan import Plan, batch_size_at, samples_before
from mixtrain.config.typed_config import to_yaml
from mixtrain.engine import model, optimizer, process_groups
from mixtrain.errors import FINISHED
from mixtrain.training import resume
from mixtrain.training.worker import run

# four steps beyond the decay
STEPS = 24
WARMUP = 4
DECAY = 20
TOP = 1e-3
BOTTOM = 1e-4
WSD = 8  # steps of its last phase


def after_warmup(value):
    """A schedule with a linear warm-up from 0; `value` of the steps done since, and of all that
    there are.
    """

    def schedule(done: int, warmup: int) -> float:
        return (
            TOP * done / warmup
            if warmup and done <= warmup
            else value(done - warmup, DECAY - warmup)
        )

    return schedule


def between(share: float) -> float:
    return BOTTOM + max(0.0, share) * (TOP - BOTTOM)


def anneal(shape):
    """WSD: the whole rate, then `shape` over the last WSD steps of the decay."""

    def value(done: int, steps: int) -> float:
        passed = (done - (steps - WSD)) / WSD
        return TOP if passed <= 0 else between(shape(passed)) if passed <= 1 else BOTTOM

    return after_warmup(value)


def inverse_square_root(done: int, warmup: int) -> float:
    if warmup and done <= warmup:
        return TOP * done / warmup
    return BOTTOM if done > DECAY else max(BOTTOM, TOP * math.sqrt(max(warmup, 1) / max(done, 1)))


STYLES = {
    "constant": after_warmup(lambda done, steps: TOP),
    "linear": after_warmup(lambda done, steps: between(1 - done / steps)),
    "cosine": after_warmup(
        lambda done, steps: between((1 + math.cos(math.pi * min(1, done / steps))) / 2)
    ),
    "inverse-square-root": inverse_square_root,
    "WSD linear": anneal(lambda passed: 1 - passed),
    "WSD cosine": anneal(lambda passed: (1 + math.cos(math.pi * passed)) / 2),
    "WSD exponential": anneal(lambda passed: 2 * 0.5**passed - 1),
    "WSD minus_sqrt": anneal(lambda passed: 1 - math.sqrt(passed)),
}
WARMUPS = {
    "no warm-up": (0, ["optimizer.lr_warmup_steps=0"]),
    "warm-up in steps": (WARMUP, [f"optimizer.lr_warmup_steps={WARMUP}"]),
    "warm-up as a fraction": (
        WARMUP,
        ["optimizer.lr_warmup_steps=null", "optimizer.lr_warmup_fraction=0.2"],
    ),
}


def style_words(style: str) -> list[str]:
    name, _, last = style.partition(" ")
    words = [
        f"optimizer.lr_decay_style={name}",
        f"optimizer.lr={TOP}",
        f"optimizer.min_lr={BOTTOM}",
    ]
    words += [f"optimizer.lr_decay_steps={DECAY}", f"trainer.max_steps={STEPS}"]
    return words + (
        [f"optimizer.lr_wsd_decay_style={last}", f"optimizer.lr_wsd_decay_steps={WSD}"]
        if last
        else []
    )


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("style", STYLES)
def test_the_learning_rate_of_every_step_follows_the_formula_of_its_style(style, warmup):
    steps, overrides = WARMUPS[warmup]
    plan = plan_of(*style_words(style), *overrides)
    weights = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=77.0)
    scheduler = optimizer.build_scheduler(plan.config.optimizer, weights)
    rates = []
    for _ in range(STEPS):
        rates.append(weights.param_groups[0]["lr"])
        scheduler.step(increment=1)
    assert rates == pytest.approx([STYLES[style](done, steps) for done in range(STEPS)], rel=1e-9)
    assert rates == pytest.approx(
        [rate(plan.config.optimizer, done) for done in range(STEPS)], rel=1e-12
    )
    assert max(rates) == pytest.approx(TOP)
    assert len(set(rates)) > 1 or (style, steps) == ("constant", 0)


@pytest.mark.parametrize(
    "style, steps, overrides, expected",
    [
        ("cosine", 24, [], [("warm-up", 4), ("cosine decay", 16), ("min_lr", 4)]),
        ("cosine", 20, [], [("warm-up", 4), ("cosine decay", 16)]),
        ("linear", 10, [], [("warm-up", 4), ("linear decay", 6)]),
        ("linear", 4, [], [("warm-up", 4)]),
        ("constant", 24, [], [("warm-up", 4), ("constant", 20)]),
        ("constant", 24, ["optimizer.lr_warmup_steps=0"], [("constant", 24)]),
        (
            "WSD linear",
            24,
            [],
            [("warm-up", 4), ("constant", 8), ("linear decay", 8), ("min_lr", 4)],
        ),
        ("WSD linear", 14, [], [("warm-up", 4), ("constant", 8), ("linear decay", 2)]),
    ],
    ids=str,
)
def test_the_phases_of_a_schedule_are_those_of_the_run(style, steps, overrides, expected):
    plan = plan_of(
        *style_words(style),
        f"optimizer.lr_warmup_steps={WARMUP}",
        *overrides,
        f"trainer.max_steps={steps}",
    )
    assert phases(plan.config) == expected
    assert sum(count for _, count in expected) == steps


def test_a_run_that_ends_in_its_warmup_is_warned_of():
    overrides = [*style_words("cosine"), f"optimizer.lr_warmup_steps={WARMUP}"]
    assert plan_of(*overrides, f"trainer.max_steps={WARMUP + 1}").warnings == ()
    assert plan_of(*overrides, f"trainer.max_steps={WARMUP}").warnings == (
        "optimizer.lr_warmup_steps = 4, but the run ends at trainer.max_steps = 4: no step has"
        " optimizer.lr = 1.00e-03, the last has 7.50e-04",
    )


def test_a_schedule_without_a_length_is_as_long_as_the_run_and_always_longer_than_its_warmup():
    settings = derived("trainer.max_steps=50", "optimizer.lr_warmup_steps=10").config.optimizer
    assert (settings.lr_decay_steps, settings.lr_warmup_steps) == (50, 10)
    settings = derived("trainer.max_steps=5", "optimizer.lr_warmup_steps=10").config.optimizer
    assert (settings.lr_decay_steps, settings.lr_warmup_steps) == (11, 10)
    overrides = ["optimizer.lr_warmup_steps=null", "optimizer.lr_warmup_fraction=0.1"]
    assert derived("trainer.max_steps=50", *overrides).config.optimizer.lr_warmup_steps == 5


def said_at_resume(before: list[str], after: list[str], step: int, skipped: int = 0) -> list[str]:
    """What a run of the words `after` says when it goes on from step `step` of one of the words
    `before`.
    """
    saved = OmegaConf.to_container(OmegaConf.create(to_yaml(plan_of(*before).config)))
    state = RunState(step=step, schedule_steps=step - skipped, config=saved)
    return resume.changed_since(plan_of(*after).config, state)


RATES = re.compile(
    r"the learning rate of step (\d+) is (\S+) \(was (\S+)\)(?:: (.*))?; to keep it, type (.*)"
)
LONGER = 2 * DECAY  # steps of the run that goes on; the one before has DECAY
AT = 18  # where WSD has begun its last phase in the shorter run alone


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("style", STYLES)
def test_a_longer_run_that_would_move_the_learning_rate_says_both_and_how_to_keep_it(
    style, warmup, monkeypatch
):
    """The schedule is as long as the run, where nothing else is said; and the warm-up may be a part
    of it.
    """
    steps, words = WARMUPS[warmup]
    here = [word for word in style_words(style) if "steps" not in word or "wsd" in word] + words
    length = [*here, f"trainer.max_steps={LONGER}"]
    lines = said_at_resume([*here, f"trainer.max_steps={DECAY}"], length, AT, skipped=1)
    assert f"optimizer.lr_decay_steps = {LONGER} (was {DECAY})" in lines
    if style == "constant":
        assert len(lines) == 1 + ("fraction" in warmup)  # the warm-up is over
        return
    step, now, was, why, keep = RATES.fullmatch(lines[-1]).groups()
    done = int(step) - 2  # a step was skipped
    assert done == (
        DECAY + 1 if style == "inverse-square-root" and "fraction" not in warmup else AT - 1
    )
    assert float(was) == pytest.approx(STYLES[style](done, steps), rel=1e-3)
    monkeypatch.setattr(sys.modules[__name__], "DECAY", LONGER)
    twice = 2 * steps if "fraction" in warmup else steps
    assert float(now) == pytest.approx(STYLES[style](done, twice), rel=1e-3) != float(was)
    assert why == f"trainer.max_steps is {LONGER}, and optimizer.lr_decay_steps = null follows it"
    assert keep == "optimizer.lr_decay_steps=20"
    assert said_at_resume([*here, "trainer.max_steps=20"], [*length, keep], AT) == []


def test_another_learning_rate_is_said_with_both_and_the_key_that_was_typed():
    before = ["trainer.max_steps=50"]
    after = ["trainer.max_steps=50", "optimizer.lr=4e-3", "optimizer.lr_warmup_steps=30"]
    first, second, line = said_at_resume(before, after, 20)
    assert first == "optimizer.lr = 0.004 (was 0.002)"
    assert second == "optimizer.lr_warmup_steps = 30 (was 20)"
    assert line == (
        "the learning rate of step 21 is 2.667e-03 (was 2.000e-03);"
        " to keep it, type optimizer.lr=0.002 optimizer.lr_warmup_steps=20"
    )
    (line,) = said_at_resume(before, [*before, "trainer.global_batch_size=32"], 20)
    assert line == "trainer.global_batch_size = 32 (was 16)"


def test_a_schedule_in_a_checkpoint_that_is_none_is_said_and_ends_nothing():
    saved = OmegaConf.to_container(
        OmegaConf.create(to_yaml(plan_of("trainer.max_steps=50").config))
    )
    saved["optimizer"] |= {"lr_warmup_steps": 90}
    lines = resume.changed_since(
        plan_of("trainer.max_steps=50").config, RunState(step=1, config=saved)
    )
    assert (
        lines[-1]
        == "its configuration has no valid schedule, and the learning rates were not compared"
    )


def decays(plan: Plan, identity) -> dict[str, float]:
    """The weight decay of every parameter, by name."""
    with process_groups.start(plan, identity) as here:
        training = optimizer.build(plan, model.build(plan, here.device))
        of = {}
        for part in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
            for group in part.optimizer.param_groups:
                of |= dict.fromkeys(map(id, group["params"]), group["weight_decay"])
        (chunk,) = training.chunks
        return {name: of[id(parameter)] for name, parameter in chunk.named_parameters()}


def test_weight_decay_reaches_every_parameter_but_the_norms(tmp_path):
    plan = plan_of(*TINY, EP + "1", PLAIN, "optimizer.weight_decay=0.37", "model.qk_layernorm=true")
    (found,) = run_ranks(1, lambda identity: decays(plan, identity), tmp_path)
    assert {name for name, decay in found.items() if decay == 0} == {
        name for name in found if "norm" in name
    }
    assert {decay for name, decay in found.items() if "norm" not in name} == {0.37}
    # of a layer two, and two of attention's heads
    assert sum("norm" in name for name in found) == 4 * 4 + 1


# [first batch, increment, samples], whole batch
RAMPS = [
    ([2, 2, 12], 8),
    ([8, 8, 300], 64),
    ([4, 4, 7], 12),
    ([1, 3, 1000], 16),
    ([16, 16, 99], 32),
    ([2, 2, 1], 6),
]


def ramp_words(ramp: list[int], whole: int) -> list[str]:
    return [
        f"trainer.rampup_batch_size=[{','.join(map(str, ramp))}]",
        f"trainer.global_batch_size={whole}",
    ]


@pytest.mark.skipif(
    not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"),
    reason="0.19 has taken the calculator out; the sizes by hand below hold with both",
)
@pytest.mark.parametrize("ramp, whole", RAMPS, ids=str)
def test_the_batch_grows_as_megatrons_calculator_says(ramp, whole):
    trainer = config_of(*ramp_words(ramp, whole)).trainer
    first, increment, samples = ramp
    theirs = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator(
        whole,
        1,
        1,
        False,
        0,
        start_global_batch_size=first,
        batch_size_increment=increment,
        ramup_samples=samples,
    )
    for consumed in range(samples + 2 * whole):
        theirs.update(consumed, consistency_check=True)
        assert batch_size_at(trainer, consumed) == theirs.get_current_global_batch_size(), consumed


BY_HAND = {
    "three increments": (([2, 2, 12], 8), [2, 2, 4, 6, 8, 8]),
    "over before it began": (([2, 2, 1], 6), [2, 6, 6]),
    "one increment": (([16, 16, 99], 32), [16, 16, 16, 16, 16, 16, 16, 32, 32]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_batches_of_a_ramp_are_those_counted_by_hand(name):
    (ramp, whole), sizes = BY_HAND[name]
    trainer = config_of(*ramp_words(ramp, whole)).trainer
    consumed = 0
    for size in sizes:
        assert batch_size_at(trainer, consumed) == size
        consumed += size


@pytest.mark.parametrize("ramp, whole", [*RAMPS, (None, 8)], ids=str)
def test_the_samples_of_a_run_are_the_sum_of_its_batches(ramp, whole):
    trainer = config_of(
        *(ramp_words(ramp, whole) if ramp else [f"trainer.global_batch_size={whole}"])
    ).trainer
    consumed = 0
    for steps in range(200):
        assert samples_before(trainer, steps) == consumed
        consumed += batch_size_at(trainer, consumed)


def records(folder: Path, *overrides: str) -> list[dict]:
    """The logged steps of a run on two data-parallel ranks."""
    words = [
        "data=mock",
        "trainer.limit_val_batches=0",
        "data.split='100,0,0'",
        "checkpoint=none",
        "logging=files",
    ]
    paths = [
        f"run_dir={folder}/run",
        f"data.path_to_cache={folder}/cache",
        "trainer.log_every_n_steps=1",
    ]
    plan = plan_of(*TINY, EP + "2", *words, *paths, *overrides)
    assert run_ranks(2, lambda identity: run(plan, identity), folder / "ranks") == [
        FINISHED,
        FINISHED,
    ]
    return [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]


# the weights stay, so a loss says which samples it is of
RESTING = ["optimizer.lr=0", "optimizer.min_lr=0"]


def test_a_ramp_reads_the_same_samples_in_the_same_order_in_growing_batches(tmp_path):
    ramp = records(
        tmp_path / "ramp", "trainer.rampup_batch_size=[2,2,12]", *RESTING, "trainer.max_steps=5"
    )
    pairs = records(
        tmp_path / "pairs", "trainer.global_batch_size=2", *RESTING, "trainer.max_steps=11"
    )
    assert [record["consumed_samples"] for record in ramp] == [2, 4, 8, 14, 22]
    fine = [record["lm_loss"] for record in pairs]  # of two samples each
    parts = [fine[0:1], fine[1:2], fine[2:4], fine[4:7], fine[7:11]]
    # the mean of the same token losses, added up in other groups: in double precision from fp32
    # sums of a microbatch
    assert [record["lm_loss"] for record in ramp] == pytest.approx(
        [sum(p) / len(p) for p in parts], rel=1e-6
    )
    gaps = [abs(a - b) for number, a in enumerate(fine) for b in fine[:number]]
    assert min(gaps) > 1e-5  # else another order would go unseen
    tokens = [sum(record["tokens_per_expert"][0]) for record in ramp]
    # two experts for each of 32 tokens
    assert tokens == [2 * 32 * size for size in (2, 2, 4, 6, 8)]


def test_the_learning_rates_that_a_run_logs_are_those_of_its_schedule(tmp_path):
    words = style_words("WSD minus_sqrt") + WARMUPS["warm-up as a fraction"][1]
    logged = [
        record["learning_rate"]
        for record in records(tmp_path, *words, "trainer.global_batch_size=2")
    ]
    assert logged == pytest.approx(
        [STYLES["WSD minus_sqrt"](done, WARMUP) for done in range(STEPS)], rel=1e-9
    )
