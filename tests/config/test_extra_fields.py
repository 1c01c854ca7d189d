"""Every field of TransformerConfig has one class, and the classes are true: what is refused changes
nothing, or fails.

`PYTHONPATH=tests python tests/config/test_extra_fields.py` records the fields of the installed
version, after they have been read and classed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from composing import ROOT, derived
from rank_workers import run_ranks
from test_parity import TINY, three_steps
from test_rules_edges import TE, problems

from mixtrain.config.extra_fields import CLASS_OF, NEEDS, READ, TABLES, dedicated_keys
from mixtrain.config.transformer_fields import ARCHITECTURE, transformer_config_defaults
from mixtrain.engine.forked_ranks import RankFailure

RECORD = ROOT / "tests" / "transformer_fields.json"  # of each version that is supported
RECORDED = json.loads(RECORD.read_text()) if RECORD.exists() else {}
VERSION = version("megatron-core")
EVERY = set().union(*map(set, RECORDED.values()))
OWN = set(dedicated_keys(derived()))
MODEL = ["parallel=ep1", "model.num_layers=2"]
ENGINE = "model.transformer_impl=transformer_engine"
LOCAL = ["model.transformer_impl=local", "model.moe_grouped_gemm=false"]
VIRTUAL = [
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_model_parallel_size=2",
]


def test_the_fields_of_the_installed_version_are_those_that_were_classed():
    assert sorted(transformer_config_defaults()) == RECORDED[VERSION]
    assert sorted(set(transformer_config_defaults()) - set(CLASS_OF) - OWN) == []


def test_every_field_has_one_class_and_the_table_has_no_other():
    listed = [
        name for table in TABLES.values() for names in table.values() for name in names.split()
    ]
    twice = [name for name, times in Counter([*listed, *ARCHITECTURE]).items() if times > 1]
    assert twice == [] and sorted(OWN & set(CLASS_OF)) == []
    assert set(CLASS_OF) == EVERY - OWN
    assert len(RECORDED) == 2 and len(EVERY) > 300


def test_what_stands_before_a_row_is_a_need_or_another_field():
    assert {word for needs in READ for word in needs.split()} == set(NEEDS) | {
        "overlap_p2p_comm",
        "cross_entropy_loss_fusion",
        "window_size",
        "fp4",
        "cpu_offloading",
        "moe_paged_stash",
    }


# The refusals

HOLDS = {  # a need, where it does not hold, and where it does
    "engine": ([], [ENGINE]),
    "megatron": ([], LOCAL),
    "local": ([ENGINE], LOCAL),
    "mask": (LOCAL, [*LOCAL, "trainer.accelerator=gpu"]),
    "fusible": ([], LOCAL),
    "chunks": (VIRTUAL[:1], VIRTUAL),
    "virtual": ([], VIRTUAL),
    "flex": ([], ["dispatcher=flex"]),
    "fp8": (["trainer.precision=bf16"], ["trainer.precision=fp8"]),
    "bf16": ([], ["trainer.precision=bf16"]),
    "offload": ([], ["trainer.fine_grained_activation_offloading=true"]),
    "one": ([], ["model.moe_router_topk=1"]),
}


@pytest.mark.parametrize("need", NEEDS)
def test_a_need_is_named_where_it_is_missing_alone(need):
    without, with_it = HOLDS[need]
    assert not NEEDS[need].holds(derived(*without)) and NEEDS[need].holds(derived(*with_it))
    assert set(HOLDS) == set(NEEDS)


@pytest.mark.parametrize(
    "name", [name for name in transformer_config_defaults() if name in CLASS_OF]
)
def test_a_field_takes_no_text_whatever_and_its_default_passes(name):
    messages = [
        text
        for rule in ("extra_fields_are_fields", "extra_fields_do_something")
        for text in problems(rule, model={"extra": {name: "x"}})
    ]
    assert len(messages) == 1 and messages[0].startswith(f"model.extra.{name}"), messages
    default = transformer_config_defaults()[name]
    if CLASS_OF[name][0] != "set" and isinstance(default, (bool, int, float, str, type(None))):
        assert problems("extra_fields_do_something", model={"extra": {name: default}}) == []


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("rotary_interleaved", 1, "true or false"),
        ("rotary_interleaved", "true", "true or false"),
        ("rotary_interleaved", None, "true or false"),
        ("softmax_scale", "abc", "a number or null"),
        ("softmax_scale", True, "a number or null"),
        ("softmax_scale", float("inf"), "a number or null"),
        ("no_rope_freq", 1.0, "a whole number or a list, each a whole number or null"),
        ("no_rope_freq", [1, "a"], "a whole number or a list, each a whole number or null"),
        ("window_size", [1], "a list of 2, each a whole number or null"),
        ("window_size", 128, "a list of 2"),
        ("softmax_type", "offbyone", "one of vanilla, off-by-one, learnable"),
        ("mlp_chunks_for_prefill", True, "a whole number"),
        ("mtp_num_layers", 2.5, "a whole number or null"),
        ("rotary_interleaved", {"a": 1}, "true or false"),
        ("cp_comm_type", 1.1, "text or a list, each text or null"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_it_must_be(name, value, wanted):
    (message,) = problems("extra_fields_are_fields", model={"extra": {name: value}})
    assert message.startswith(f"model.extra.{name} = ") and f" must be {wanted}" in message


@pytest.mark.parametrize(
    "extra",
    [
        {"softmax_scale": 1},
        {"softmax_scale": None},
        {"no_rope_freq": [0, 1]},
        {"window_size": [128, 0]},
        {"softmax_type": "off-by-one"},
        {"cp_comm_type": ["p2p", "a2a"]},
        {"cp_comm_type": "p2p"},
    ],
)
def test_a_value_of_its_type_is_taken(extra):
    assert problems("extra_fields_are_fields", model={"extra": extra}) == []
    assert problems("extra_fields_do_something", *TE, model={"extra": extra}) == []


def test_a_field_that_is_read_beside_another_alone_names_it():
    (message,) = problems(
        "extra_fields_do_something", *TE, model={"extra": {"window_attn_skip_freq": 2}}
    )
    assert "is read only with model.extra.window_size; use null" in message
    both = {"window_attn_skip_freq": 2, "window_size": [1, 0]}
    assert problems("extra_fields_do_something", *TE, model={"extra": both}) == []


@pytest.mark.parametrize("name", sorted(OWN & EVERY))
def test_a_field_with_a_key_of_its_own_names_the_key(name):
    own = dedicated_keys(derived())
    (message,) = problems("extra_fields_are_fields", model={"extra": {name: 1}})
    assert message == f"model.extra.{name} has a key of its own; set {own[name]}"


# That the classes are true


def outcome(folder: Path, words: list[str], extra: dict) -> dict | str:
    """Three steps with fields that no rule has looked at; or "fails"."""
    plan = derived(*TINY, *MODEL, *words)
    plan = replace(plan, config=replace(plan.config, model=replace(plan.config.model, extra=extra)))
    try:
        return run_ranks(
            plan.world_size, lambda identity: three_steps(plan, identity), folder, timeout=60
        )[0]
    except RankFailure:
        return "fails"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, dict]:
    """What the layers compute without any of these fields."""
    folder = tmp_path_factory.mktemp("plain")
    found = {
        "torch": outcome(folder / "torch", [], {}),
        "local": outcome(folder / "local", LOCAL, {}),
    }
    assert "fails" not in found.values()
    return found


DIFFERS = "differs"
SAME = "same"
FAILS = "fails"
TRUE = [  # a field's value, with which layers, and what comes of it
    ("rotary_interleaved", True, "torch", DIFFERS),
    ("no_rope_freq", 1, "torch", DIFFERS),
    ("softmax_scale", 0.3, "torch", DIFFERS),
    ("softmax_scale", 0.3, "local", DIFFERS),
    ("glu_linear_offset", 0.3, "local", DIFFERS),
    ("glu_linear_offset", 0.3, "torch", SAME),
    ("softmax_type", "off-by-one", "local", DIFFERS),
    ("softmax_type", "off-by-one", "torch", SAME),
    ("softmax_type", "learnable", "local", FAILS),
    ("window_size", [4, 0], "torch", SAME),
    ("window_size", [4, 0], "local", FAILS),
    ("cross_entropy_loss_fusion", True, "torch", FAILS),
    ("cross_entropy_loss_fusion", True, "local", DIFFERS),
    ("layernorm_zero_centered_gamma", True, "torch", SAME),
    ("layernorm_zero_centered_gamma", True, "local", FAILS),
    ("moe_permute_fusion", True, "torch", FAILS),
    ("moe_router_fusion", True, "torch", FAILS),
    ("cpu_offloading", True, "torch", FAILS),
    ("tp_comm_overlap", True, "torch", SAME),
    ("moe_layer_recompute", True, "torch", SAME),
    ("moe_token_dropping", True, "torch", SAME),
    ("qk_l2_norm", True, "local", SAME),
    ("qk_clip", True, "torch", SAME),
    ("apply_residual_connection_post_layernorm", True, "torch", SAME),
    ("flash_decode", True, "torch", SAME),
    ("barrier_with_L1_time", False, "torch", SAME),
    ("embedding_init_method_std", 0.3, "torch", SAME),
    ("enable_cuda_graph", True, "torch", FAILS),
    ("hybrid_context_parallel", True, "torch", FAILS),
    ("moe_layer_freq", 2, "torch", SAME),
]


@pytest.mark.parametrize("name, value, layers, comes", TRUE, ids=lambda part: str(part))
def test_what_a_field_does_is_what_its_class_says(name, value, layers, comes, plain, tmp_path):
    overrides = LOCAL if layers == "local" else []
    found = outcome(tmp_path, overrides, {name: value})
    assert (found if found == FAILS else SAME if found == plain[layers] else DIFFERS) == comes
    refused = problems("extra_fields_do_something", *overrides, model={"extra": {name: value}})
    assert bool(refused) == (comes != DIFFERS), refused


if __name__ == "__main__":
    RECORD.write_text(
        json.dumps(RECORDED | {VERSION: sorted(transformer_config_defaults())}, indent=1) + "\n"
    )
