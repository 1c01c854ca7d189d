"""Every recipe and every option composes and plans; what is refused is refused in words a user can
act on.
"""

from __future__ import annotations

import re

import pytest
from composing import RECIPES, ROOT, config_of, derived, plan_of, problems_of, tree_of
from omegaconf import OmegaConf

from mixtrain.config.choices import DataKind, TransformerImpl
from mixtrain.config.compose import ADDED_GROUPS, CONF, SCENARIOS, options
from mixtrain.config.laptop_layout import LAPTOP_RANKS
from mixtrain.config.memory import GIB
from mixtrain.config.schema import legal_keys
from mixtrain.config.typed_config import leaves
from mixtrain.launch.machine_checks import package_problems

GROUPS = sorted(
    path.name
    for path in CONF.iterdir()
    if path.is_dir() and path.name not in (*ADDED_GROUPS, SCENARIOS)
)
SHRINKS = options("shrink")

# What +shrink may change: sizes, how long the run is, and where it runs and writes
SIZES = {
    "run_dir",
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.moe_ffn_hidden_size",
    "model.moe_shared_expert_intermediate_size",
    "model.vocab_size",
    "model.max_position_embeddings",
    "model.hf_model",  # to null: a shrunk model is not that model
    "data.seq_length",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.max_steps",
    "trainer.micro_batch_size",
    "trainer.global_batch_size",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
    "trainer.device_memory_gib",
    "optimizer.lr_warmup_steps",
    "optimizer.lr_decay_steps",
}

# What the certificate needs beside: fp32, wide weights, and a step in which small differences stay
# small
FOR_PARITY = {
    "model.init_method_std",
    "data.kind",
    "trainer.precision",
    "trainer.rampup_batch_size",
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.adam_eps",
    "optimizer.lr_decay_style",
    "optimizer.lr_warmup_fraction",
    "optimizer.lr_wsd_decay_steps",
}


def test_the_recipes_of_the_repository_are_those_that_hydra_finds():
    assert RECIPES
    assert options("recipe") == RECIPES
    assert (CONF / "recipe").resolve() == ROOT / "recipes"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_under_its_own_name(name):
    config = plan_of(f"+recipe={name}").config
    assert (config.name, config.run_dir) == (name, f"runs/{name}")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_global_and_sets_only_keys_there_are(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    recipe = OmegaConf.to_container(OmegaConf.create(text))
    recipe.pop("defaults", None)
    assert {key for key, _ in leaves(recipe)} <= set(legal_keys())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_that_its_data_is_mock_and_drops_no_token(name):
    config = config_of(f"+recipe={name}")
    assert config.data.kind is DataKind.mock
    assert "  - override /data: mock #" in (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert config.dispatcher.moe_expert_capacity_factor is None
    assert not config.router.moe_router_force_load_balancing


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_gpus_it_is_for(name):
    plan = plan_of(f"+recipe={name}")  # no rule is broken, and the one about memory was asked:
    assert plan.state_bytes < plan.config.trainer.device_memory_gib * GIB


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_needs_no_package_beside_pytorch_and_megatron(name):
    config = config_of(f"+recipe={name}")
    assert config.model.transformer_impl is TransformerImpl.torch and config.model.moe_grouped_gemm
    assert config.parallel.sequence_parallel == (config.parallel.tensor_model_parallel_size > 1)
    assert list(package_problems(derived(f"+recipe={name}"))) == []


SOURCES = re.compile(
    r"ours|Megatron-LM|ModelZoo|NeMo|Launcher|AWS|Bridge|the same script|all four sources"
)
NUMBER = re.compile(r"^  (\w+): (-?[\d.]+(?:e-?\d+)?)(?: +# (.*))?$")


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_recipe_has_its_source_on_its_line_or_on_its_sections(name):
    section = ""
    numbers = 0
    for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines():
        if re.match(r"\w+:", line):
            section = line.partition("#")[2]
        elif found := NUMBER.match(line):
            numbers += 1
            assert SOURCES.search(section + (found[3] or "")), line
    assert numbers >= 8


def test_the_slice_for_one_gpu_is_the_largest_that_leaves_a_fifth_of_it_to_activations():
    recipe = "+recipe=mixtral_8x7b_4layers_1gpu"
    plan = plan_of(recipe)
    assert plan.total_parameters / 1e9 == pytest.approx(6.07, abs=0.005)
    assert plan.state_bytes / GIB == pytest.approx(101.7, abs=0.05)
    room = 0.8 * plan.config.trainer.device_memory_gib * GIB
    assert plan.state_bytes < room < derived(recipe, "model.num_layers=5").state_bytes


def test_the_page_about_recipes_shows_each_with_the_figures_of_its_plan():
    page = (ROOT / "docs" / "recipes.md").read_text()
    lines = [line.strip("|") for line in page.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [row[0] for row in rows] == [f"`{name}`" for name in RECIPES]
    for (_, layout, gpus, parameters, state, _), name in zip(rows, RECIPES, strict=True):
        plan = plan_of(f"+recipe={name}")
        parallel = plan.config.parallel
        memory = plan.config.trainer.device_memory_gib
        sizes = {
            "TP": parallel.tensor_model_parallel_size,
            "PP": parallel.pipeline_model_parallel_size,
            "VPP": parallel.virtual_pipeline_model_parallel_size or 1,
            "EP": parallel.expert_model_parallel_size,
            "DP": plan.data_parallel_size,
            "EDP": plan.expert_data_parallel_size,
        }
        assert layout == (
            " ".join(f"{key}{size}" for key, size in sizes.items() if size > 1)
            or "no part is split"
        )
        assert gpus == f"{plan.world_size} of {memory:g} GiB"
        assert (
            parameters
            == f"{plan.total_parameters / 1e9:.1f} B, {plan.active_parameters / 1e9:.1f} B active"
        )
        assert state == f"{plan.state_bytes / GIB:.1f} GiB"


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunk_recipe_plans_or_is_refused_with_a_layout_that_plans(name, shrink):
    overrides = [f"+recipe={name}", f"+shrink={shrink}"]
    problems = problems_of(*overrides)
    if problems:  # beside it, at most the batch of a virtual pipeline that no ranks are there for
        (offered,) = [
            found for text in problems if (found := re.search(r"The nearest layout: (.*)$", text))
        ]
        overrides += offered[1].split(" ")
    plan = plan_of(*overrides)
    assert plan.world_size <= LAPTOP_RANKS
    assert plan.total_parameters < 100e6


@pytest.mark.parametrize("recipe", [[], *[[f"+recipe={name}"] for name in RECIPES]], ids=str)
def test_shrink_sets_sizes_only_and_for_parity_also_what_a_comparison_needs(recipe):
    whole = dict(leaves(OmegaConf.to_container(tree_of(*recipe))))
    for shrink, may in (("laptop", SIZES), ("parity", SIZES | FOR_PARITY)):
        shrunk = dict(leaves(OmegaConf.to_container(tree_of(*recipe, f"+shrink={shrink}"))))
        assert whole.keys() == shrunk.keys()
        changed = {key for key in whole if whole[key] != shrunk[key]}
        assert (
            changed and {key for key in changed - may if not key.startswith("parallel.")} == set()
        )
        assert shrink == "parity" or changed <= may


@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunk_recipe_keeps_its_layout_and_does_not_write_where_the_recipe_does(name):
    whole = config_of(f"+recipe={name}")
    shrunk = config_of(f"+recipe={name}", "+shrink=laptop")
    assert shrunk.parallel == whole.parallel
    assert (shrunk.router, shrunk.dispatcher) == (whole.router, whole.dispatcher)
    assert shrunk.run_dir != whole.run_dir


@pytest.mark.parametrize(
    "group, option", [(group, option) for group in GROUPS for option in options(group)]
)
def test_an_option_composes_on_top_of_the_default_or_is_refused_by_key(group, option):
    for problem in problems_of(f"{group}={option}"):
        assert any(key in problem for key in legal_keys()), problem
        assert re.search(
            "must be|must divide|has no value|needs|; use|The nearest layout", problem
        ), problem
