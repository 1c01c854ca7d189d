"""Every option of every group trains two steps on CPU ranks, or is refused with a message that says what to do."""

from __future__ import annotations

import math

import pytest
from composing import problems_of
from test_parity import TINY, measure

from mixtrain.compose import options

# What an option needs beside itself to run at the size of the tests.
# fmt: off
BESIDE = {
    ("data", "stdlib"):             ["data.seq_length=32"],  # its text and tokenizer: tests/test_launch.py
    ("model", "mixtral_small"):     [],
    ("parallel", "ep8"):            [],
    ("router", "expert_bias"):      [],
    ("optimizer", "adam_wsd"):      ["optimizer.lr_wsd_decay_steps=1"],
}
REFUSED = {
    ("parallel", "fsdp"):           "Megatron-FSDP does not run on the CPU",
    ("dispatcher", "flex"):         "flex needs CUDA and the package deep_ep",
    ("parallel", "ep16"):           "on the CPU mixtrain starts at most 8",
    ("parallel", "tp1_pp4_ep8"):    "on the CPU mixtrain starts at most 8",
    ("parallel", "tp2_pp4_ep4"):    "model.transformer_impl = local refuses it",
    ("parallel", "tp2_pp8_ep8"):    "model.transformer_impl = local refuses it",
}
# fmt: on
TRAINED = [(group, name) for group in ("router", "dispatcher", "parallel", "optimizer") for name in options(group)]


@pytest.mark.parametrize("group, name", [pair for pair in TRAINED if pair not in REFUSED])
def test_an_option_trains_on_cpu_ranks(group, name, tmp_path):
    figures = measure([f"{group}={name}", *SIZES[group], *BESIDE.get((group, name), [])], tmp_path)
    assert all(math.isfinite(value) for value in figures["losses"] + figures["norms"])
    assert figures["losses"][0] == pytest.approx(math.log(256), abs=0.15)
    assert figures["losses"][2] < figures["losses"][0]


SIZES = {
    "router": ["parallel=ep2"],
    "dispatcher": ["parallel=ep2"],
    "parallel": [],
    "optimizer": ["parallel=ep2", "optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "optimizer.lr_warmup_steps=0"],
}


@pytest.mark.parametrize("group, name", REFUSED)
def test_an_option_that_cannot_run_here_is_refused_by_name(group, name):
    assert any(REFUSED[group, name] in problem for problem in problems_of(*TINY, f"{group}={name}"))


@pytest.mark.parametrize("kind", ["full", "core_attn", "layernorm", "moe", "shared_experts"])
def test_recompute_changes_nothing_but_memory(kind, tmp_path):
    shared = ["model.moe_shared_expert_intermediate_size=32"]
    how = (
        ["recompute_granularity=full", "recompute_method=block", "recompute_num_layers=2"]
        if kind == "full"
        else ["recompute_granularity=selective", f"recompute_modules=[{kind}]"]
    )
    plain = measure(["parallel=ep2", *shared], tmp_path / "plain")
    again = measure(["parallel=ep2", *shared, *[f"trainer.{key}" for key in how]], tmp_path / "again")
    if kind == "layernorm":  # its output is made anew in another order of additions
        assert again["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert again["norms"] == pytest.approx(plain["norms"], rel=1e-6)
    else:
        assert again == plain  # to the last bit: the same operations, twice


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_a_schedule_trains(style, tmp_path):
    words = ["parallel=ep1", f"optimizer.lr_decay_style={style}", "optimizer.lr_warmup_steps=1"]
    wsd = ["optimizer.lr_wsd_decay_steps=1"] if style == "WSD" else []
    figures = measure([*words, *wsd], tmp_path)
    assert figures["losses"][1] == figures["losses"][0]  # the first step of a warm-up has learning rate 0
    assert figures["losses"][2] < figures["losses"][1]
