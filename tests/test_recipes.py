"""Every recipe and every option composes and plans; what is refused is refused in words a user can act on."""

from __future__ import annotations

import re

import pytest
from composing import RECIPES, ROOT, config_of, plan_of, problems_of, tree_of
from omegaconf import OmegaConf

from mixtrain.compose import ADDED_GROUPS, CONF, options
from mixtrain.config import leaves, legal_keys
from mixtrain.layouts import LAPTOP_RANKS

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ADDED_GROUPS)
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


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunk_recipe_plans_or_is_refused_with_a_layout_that_plans(name, shrink):
    words = [f"+recipe={name}", f"+shrink={shrink}"]
    problems = problems_of(*words)
    if problems:
        (problem,) = problems
        offered = re.search(r"The nearest layout: (.*)$", problem)
        assert offered, problem
        words += offered[1].split(" ")
    plan = plan_of(*words)
    assert plan.world_size <= LAPTOP_RANKS
    assert plan.total_parameters < 100e6


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("recipe", [[], *[[f"+recipe={name}"] for name in RECIPES]], ids=str)
def test_shrink_sets_sizes_only(recipe, shrink):
    whole = dict(leaves(OmegaConf.to_container(tree_of(*recipe))))
    shrunk = dict(leaves(OmegaConf.to_container(tree_of(*recipe, f"+shrink={shrink}"))))
    assert whole.keys() == shrunk.keys()
    changed = {key for key in whole if whole[key] != shrunk[key]}
    assert changed and changed <= SIZES


@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunk_recipe_keeps_its_layout_and_does_not_write_where_the_recipe_does(name):
    whole, shrunk = config_of(f"+recipe={name}"), config_of(f"+recipe={name}", "+shrink=laptop")
    assert shrunk.parallel == whole.parallel
    assert (shrunk.router, shrunk.dispatcher) == (whole.router, whole.dispatcher)
    assert shrunk.run_dir != whole.run_dir


@pytest.mark.parametrize("group, option", [(group, option) for group in GROUPS for option in options(group)])
def test_an_option_composes_on_top_of_the_default_or_is_refused_by_key(group, option):
    for problem in problems_of(f"{group}={option}"):
        assert any(key in problem for key in legal_keys()), problem
        assert "must be" in problem or "has no value" in problem or "needs" in problem, problem
