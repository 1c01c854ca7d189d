"""Every option of every group trains two steps on CPU ranks or is refused with what to do."""

from __future__ import annotations

import math

import pytest
from composing import plan_of, problems_of
from rank_workers import run_ranks
from test_parity import TINY, measure
from test_run import start

from mixtrain.config.compose import CONF, options
from mixtrain.launch.machine_checks import machine_problems
from mixtrain.system.status import read_status
from mixtrain.training.worker import run

pytestmark = pytest.mark.long
RATES = ["optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "optimizer.lr_warmup_steps=0"]
# which change what a step computes
GROUPS = ("router", "dispatcher", "parallel", "model", "optimizer")

# What an option needs beside itself to run at the size of the tests.
# fmt: off
BESIDE = {
    "router":     ["parallel=ep2"],
    "dispatcher": ["parallel=ep2"],
    "parallel":   [],
    "model":      ["parallel=ep2"],
    "optimizer":  ["parallel=ep2", *RATES],
    "adam_wsd":   ["optimizer.lr_wsd_decay_steps=1"],
}
REFUSED = {
    ("parallel", "fsdp"):        "Megatron-FSDP does not run on the CPU",
    ("parallel", "ep16"):        "on the CPU mixtrain starts at most 8",
    ("parallel", "tp1_pp4_ep8"): "on the CPU mixtrain starts at most 8",
    ("parallel", "tp2_pp4_ep4"): "on the CPU mixtrain starts at most 8",
    ("parallel", "tp2_pp8_ep8"): "on the CPU mixtrain starts at most 8",
    ("dispatcher", "flex"):      "flex needs CUDA and the package deep_ep",
    ("data", "indexed"):         "data.data_path has no value",
}
ELSEWHERE = {
    ("data", "stdlib"):          "tests/launch/test_launch.py",
    ("data", "mock"):            "every test here",
    ("shrink", "laptop"):        "tests of the recipes, below",
    ("shrink", "parity"):        "tests/proof/test_certificate.py",
    ("trainer", "laptop"):       "every test here",
    ("launcher", "auto"):        "every test here",
    ("launcher", "local"):       "tests/launch/test_choose.py",
    ("launcher", "slurm"):       "tests/launch/test_choose.py",
}
# fmt: on
TRAINED = [
    (group, name)
    for group in ("router", "dispatcher", "parallel", "model", "optimizer")
    for name in options(group)
]
RECORDED = [(group, name) for group in ("checkpoint", "logging") for name in options(group)]
ON_GPUS = [("trainer", name) for name in options("trainer") if name != "laptop"]
RECIPES = options("recipe")
# eight ranks, and as many microbatches as a pipeline wants
LARGE = [recipe for recipe in RECIPES if "pp" in recipe]
SHARED = ["parallel=ep2", "model.num_layers=2", "model.moe_shared_expert_intermediate_size=32"]


def test_every_option_of_every_group_is_tried():
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"recipe", "bench"}
    tried = {*TRAINED, *RECORDED, *ON_GPUS, *REFUSED, *ELSEWHERE}
    assert {(group, name) for group in groups for name in options(group)} == tried


@pytest.mark.parametrize("group, name", [pair for pair in TRAINED if pair not in REFUSED])
def test_an_option_trains_on_cpu_ranks(group, name, tmp_path):
    words = [f"{group}={name}", *BESIDE[group], *BESIDE.get(name, [])]
    figures = measure(words if "vpp" in name else ["model.num_layers=2", *words], tmp_path)
    assert all(math.isfinite(value) for value in figures["losses"] + figures["norms"])
    assert figures["losses"][0] == pytest.approx(math.log(256), abs=0.15)
    assert figures["losses"][2] < figures["losses"][0]


@pytest.mark.parametrize("group, name", REFUSED)
def test_an_option_that_cannot_run_here_is_refused_by_name(group, name):
    words = [word for word in TINY if group != "data" or not word.startswith("data")]
    assert any(
        REFUSED[group, name] in problem for problem in problems_of(*words, f"{group}={name}")
    )


@pytest.mark.parametrize("group, name", ON_GPUS)
def test_an_option_for_gpus_says_so_where_there_are_none(group, name, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan = plan_of(
        f"{group}={name}", "parallel=ep1", "data=mock", "model.max_position_embeddings=4096"
    )
    problems = machine_problems(plan, None, [])
    assert any(
        "trainer.accelerator = gpu" in problem and "0 GPUs" in problem for problem in problems
    )


@pytest.mark.parametrize("group, name", RECORDED)
def test_an_option_about_records_leaves_them_or_not(group, name, tmp_path):
    directory, codes = start(tmp_path, "trainer.max_steps=2", f"{group}={name}")
    assert codes == [0, 0]
    assert (directory / "iter_0000002").exists() == (name != "none")
    assert (directory / "tensorboard").exists() == (name != "files")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """The cache for the data of the first recipe's run; the others read it."""
    return f"data.path_to_cache={tmp_path_factory.mktemp('cache')}"


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=pytest.mark.long) if name in LARGE else name for name in RECIPES],
)
def test_a_shrunk_recipe_trains_two_steps_at_its_layout_or_the_nearest(recipe, cache, tmp_path):
    """The command that the refusal offers works."""
    words = [
        f"+recipe={recipe}",
        "+shrink=laptop",
        "trainer.max_steps=2",
        "trainer.limit_val_batches=0",
    ]
    words += ["checkpoint=none", "logging=files", f"run_dir={tmp_path}/run", cache]
    for problem in problems_of(*words):
        if "The nearest layout: " in problem:
            words += problem.split("The nearest layout: ")[1].split()
    plan = plan_of(*words)
    assert not machine_problems(plan, None, words)
    codes = run_ranks(plan.world_size, lambda identity: run(plan, identity), tmp_path / "ranks")
    assert codes == [0] * plan.world_size
    assert read_status(tmp_path / "run")["step"] == 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    return measure(SHARED, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "kind", ["full", "core_attn", "layernorm", "moe", "moe_act", "shared_experts"]
)
def test_recompute_changes_nothing_but_memory(kind, plain, tmp_path):
    how = (
        ["recompute_granularity=full", "recompute_method=block", "recompute_num_layers=2"]
        if kind == "full"
        else ["recompute_granularity=selective", f"recompute_modules=[{kind}]"]
    )
    again = measure([*SHARED, *[f"trainer.{key}" for key in how]], tmp_path)
    if kind == "layernorm":  # its output is made anew in another order of additions
        assert again["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert again["norms"] == pytest.approx(plain["norms"], rel=1e-6)
    else:
        assert again == plain  # to the last bit: the same operations, twice
