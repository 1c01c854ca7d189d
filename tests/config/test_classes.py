"""What makes another model of a recipe is told from what only runs it elsewhere: in the plan, the
log and the files.
"""

from __future__ import annotations

from collections import Counter

import pytest
from composing import RECIPES
from omegaconf import OmegaConf
from rank_workers import run_ranks

from mixtrain.config.compose import compose
from mixtrain.config.key_effects import CLASSES, EXECUTION, MATHEMATICS, RECORDS, Change, changes
from mixtrain.config.plan import Plan
from mixtrain.config.plan_page import render
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config, legal_keys
from mixtrain.errors import FINISHED
from mixtrain.system.status import read_status
from mixtrain.training.worker import run

RECIPE = "+recipe=mixtral_8x7b_ep8"


def planned(*overrides: str) -> Plan:
    """The plan as train.py makes it: with the recipe that the overrides name, as it stands."""
    (job,), problems = compose(list(overrides))
    recipe = job.recipe and (job.recipe.name, Config.from_hydra(job.recipe.tree))
    return make_plan(Config.from_hydra(job.tree, problems), None, problems, recipe)


def changed_keys(plan: Plan) -> tuple[list[str], list[str]]:
    return [change.key for change in plan.changed_mathematics], [
        change.key for change in plan.changed_execution
    ]


def test_every_key_is_in_exactly_one_class_and_no_class_names_another():
    named = Counter(key for keys in CLASSES.values() for key in keys.split())
    assert named == dict.fromkeys(legal_keys(), 1)


def test_an_override_of_each_kind_is_a_change_of_its_kind_with_both_values():
    plan = planned(
        RECIPE,
        "optimizer.lr=3e-4",
        "optimizer.bucket_size=1000000",
        "name=mine",
        "trainer.mode=plan",
    )
    assert plan.recipe == "mixtral_8x7b_ep8"
    assert plan.changed_mathematics == (Change("optimizer.lr", 1e-4, 3e-4),)
    assert plan.changed_execution == (Change("optimizer.bucket_size", None, 1000000),)


def test_records_are_no_change():
    (job,), _ = compose([])
    recipe = Config.from_hydra(job.tree)
    here = Config.from_hydra(job.tree)
    for key in CLASSES[RECORDS].split():
        section = here
        for part in key.split(".")[:-1]:
            section = getattr(section, part)
        setattr(section, key.split(".")[-1], "another value")
    assert changes(recipe, here) == {MATHEMATICS: [], EXECUTION: []}


@pytest.mark.parametrize("shrink", [[], ["+shrink=laptop"]], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_it_stands_and_a_recipe_shrunk_have_no_changes(name, shrink):
    (job,), _ = compose([f"+recipe={name}", *shrink])
    assert job.recipe.name == name
    found = changes(Config.from_hydra(job.recipe.tree), Config.from_hydra(job.tree))
    assert found == {MATHEMATICS: [], EXECUTION: []}


def test_without_a_recipe_there_is_nothing_to_have_changed():
    plan = planned("optimizer.lr=3e-4", "optimizer.bucket_size=1000000")
    assert (plan.recipe, plan.changed_mathematics, plan.changed_execution) == (None, (), ())
    assert "recipe" not in render(plan)


def test_an_option_of_a_group_is_a_change_of_every_key_it_sets_otherwise():
    router = changed_keys(planned(RECIPE, "router=none", "router.moe_aux_loss_coeff=0"))
    assert router == (["router.moe_router_load_balancing_type", "router.moe_aux_loss_coeff"], [])
    assert changed_keys(planned(RECIPE, "dispatcher=allgather")) == (
        [],
        ["dispatcher.moe_token_dispatcher_type"],
    )


def test_what_is_laid_on_a_shrunk_recipe_is_a_change_and_its_sizes_are_none():
    words = (
        RECIPE,
        "+shrink=laptop",
        "parallel.expert_model_parallel_size=2",
        "model.hidden_size=64",
    )
    mathematics, execution = changed_keys(planned(*words))
    assert mathematics == ["model.hidden_size"] and execution == [
        "parallel.expert_model_parallel_size"
    ]


def test_an_extra_field_changes_the_mathematics():
    mathematics, _ = changed_keys(planned(RECIPE, "model.extra.rotary_interleaved=true"))
    assert mathematics == ["model.extra"]


def test_the_plan_lists_both_kinds_or_says_that_the_recipe_stands():
    lines = render(
        planned(RECIPE, "optimizer.lr=3e-4", "optimizer.bucket_size=1000000")
    ).splitlines()
    assert "recipe                 mixtral_8x7b_ep8" in lines
    assert "  changes mathematics  optimizer.lr = 0.0003 (recipe: 0.0001)" in lines
    assert "  changes execution    optimizer.bucket_size = 1000000 (recipe: null)" in lines
    page = render(planned(RECIPE))
    assert (
        "recipe                 mixtral_8x7b_ep8, unchanged" in page.splitlines()
        and "  changes" not in page
    )


def test_a_change_is_written_as_it_would_be_typed():
    change = Change("trainer.rampup_batch_size", None, [2, 2, 12])
    assert str(change) == "trainer.rampup_batch_size = [2,2,12] (recipe: null)"
    assert (
        str(Change("model.qk_layernorm", False, True))
        == "model.qk_layernorm = true (recipe: false)"
    )


def test_a_run_leaves_the_changed_mathematics_in_status_configuration_and_log(tmp_path):
    plan = planned(
        RECIPE,
        "+shrink=laptop",
        "parallel.expert_model_parallel_size=2",
        "trainer.max_steps=1",
        "optimizer.lr=1e-3",
        "data.seq_length=32",
        "trainer.global_batch_size=2",
        "trainer.limit_val_batches=0",
        "data.split='100,0,0'",
        "optimizer.lr_warmup_steps=0",
        "checkpoint=none",
        "logging=files",
        "trainer.timeout_minutes=1",
        f"run_dir={tmp_path}/run",
        f"data.path_to_cache={tmp_path}/cache",
    )
    assert run_ranks(2, lambda identity: run(plan, identity), tmp_path / "ranks") == [
        FINISHED,
        FINISHED,
    ]
    written = "optimizer.lr = 0.001 (recipe: 0.0001)"
    status = read_status(tmp_path / "run")
    assert status["state"] == "finished" and written in status["changed_mathematics"]
    assert not [text for text in status["changed_mathematics"] if text.startswith("parallel.")]
    comment = f"changes the mathematics of mixtral_8x7b_ep8: {written}"
    saved = tmp_path / "run" / "config.yaml"
    head = [line for line in saved.read_text().splitlines() if line.startswith("#")]
    assert f"# {comment}" in head and len(head) == len(status["changed_mathematics"])
    assert saved.read_text().splitlines()[: len(head)] == head
    assert Config.from_hydra(OmegaConf.load(saved)) == plan.config
    assert comment in (tmp_path / "ranks" / "rank_0.log").read_text().splitlines()
