"""A typed option is composed as it is, or the command is refused with the key and both values."""

from __future__ import annotations

import shutil
from itertools import zip_longest

import pytest
from composing import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mixtrain.config.compose import CONF, ComposedJob, options
from mixtrain.config.contradictions import contradictions
from mixtrain.config.key_effects import show
from mixtrain.errors import REFUSED
from train import main

RECIPE = "+recipe=mixtral_8x7b_ep8"
SHRINK = "+shrink=laptop"
# groups of which the recipe or the shrink sets keys
SET = ("data", "model", "optimizer", "trainer")


def composed(*overrides: str, conf=CONF) -> ComposedJob:
    """Compose with Hydra once; `compose`, which checks the overrides, does it three times."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        return ComposedJob(compose("config", overrides=list(overrides)), list(overrides))


def found(*overrides: str, conf=CONF) -> list[str]:
    return contradictions(composed(*overrides, conf=conf), conf)


def rows() -> list[list[str]]:
    """Command lines that pick an option of every such group each, and together all options."""
    columns = [[f"{group}={option}" for option in options(group)] for group in SET]
    return [[word for word in row if word] for row in zip_longest(*columns)]


def test_every_value_of_an_option_that_is_typed_is_composed_or_is_said_with_the_other_value():
    refused = 0
    for overrides in rows():
        job = composed(RECIPE, SHRINK, *overrides)
        tree = OmegaConf.to_container(job.tree)
        problems = contradictions(job)
        for word in overrides:
            group, _, option = word.partition("=")
            message = " ".join(
                problem for problem in problems if problem.startswith(f"{word} sets ")
            )
            own = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
            for name, value in own.items():
                if name == "defaults" or value == "???":
                    continue
                key = f"{group}.{name}"
                here = tree[group][name]
                both = f" {key}={show(value)}" in message and f" {key}={show(here)}" in message
                assert both == (here != value), key
                refused += both
    assert refused > 10


def test_a_size_of_a_model_that_is_typed_is_not_shrunk_in_silence():
    (problem,) = found("model=mixtral_8x7b", SHRINK, "model.hidden_size=64")
    assert problem.startswith(
        "model=mixtral_8x7b sets model.num_layers=32 model.ffn_hidden_size=14336 "
    )
    assert (
        f" model.hf_model=mistralai/Mixtral-8x7B-v0.1, but {SHRINK} changes this to"
        " model.num_layers=null " in problem
    )
    assert "hidden_size=64" not in problem and "moe_router_topk" not in problem


def test_a_trainer_that_is_typed_is_not_changed_by_the_recipe_in_silence():
    (problem,) = found(RECIPE, "trainer=laptop")
    ours, theirs = problem.split(f", but {RECIPE} changes this to ")
    assert ours.startswith("trainer=laptop sets trainer.num_nodes=1 trainer.max_steps=300 ")
    assert theirs.startswith("trainer.num_nodes=2 trainer.max_steps=500000 ")
    assert theirs.endswith(
        "; type each of these keys with the value you mean, or leave out one of the two"
    )
    typed = ours.removeprefix("trainer=laptop sets ").split(" ")
    assert found(RECIPE, "trainer=laptop", *typed) == []  # the words can be typed as they are shown


def test_what_the_recipe_and_what_the_shrink_change_of_an_option_is_told_apart():
    recipe, shrink = found(RECIPE, SHRINK, "optimizer=adam")
    assert f"but {RECIPE} changes this to optimizer.lr=0.0001 " in recipe and "warmup" not in recipe
    assert shrink.startswith(
        f"optimizer=adam sets optimizer.lr_warmup_steps=20, but {SHRINK} changes this to"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer=laptop", "model=mixtral_8x7b", "router=none"],
        [RECIPE, SHRINK],
        [RECIPE, "model=mixtral_8x7b", "parallel=ep1", "checkpoint=none", "dispatcher=allgather"],
        [RECIPE, "data=indexed"],  # its data_path is to be typed
        [RECIPE, "router='none'", "router.moe_aux_loss_coeff=0", "+model.extra.foo=1"],
    ],
    ids=" ".join,
)
def test_words_that_agree_are_left_alone(overrides):
    assert found(*overrides) == []


def test_what_an_option_takes_over_from_another_is_not_typed(tmp_path):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    recipe = "# @package _global_\nname: mine\nlauncher: {partition: gpu, type: local}\n"
    (conf / "recipe" / "mine.yaml").write_text(recipe)
    (problem,) = found("+recipe=mine", "launcher=slurm", conf=conf)
    assert problem.startswith(
        "launcher=slurm sets launcher.type=slurm, but +recipe=mine changes this to"
        " launcher.type=local; "
    )


def test_a_contradiction_is_refused_before_anything_starts_and_beside_the_other_problems(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert (
        main([RECIPE, "trainer=laptop", "trainer.max_stepz=1", "model.moe_router_topk=9"])
        == REFUSED
    )
    lines = capsys.readouterr().err.splitlines()
    starts = [
        "mixtrain:",
        "  - trainer.max_stepz",
        "  - trainer=laptop sets",
        "  - model.moe_router_topk",
    ]
    assert all(any(line.startswith(start) for line in lines) for start in starts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", options("recipe"))
def test_the_words_that_a_recipe_offers_for_ones_own_data_are_not_refused(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    (offered,) = [
        line.split("until you type ")[1] for line in text.splitlines() if "until you type" in line
    ]
    overrides = (
        offered.replace("data_path=[...]", "data_path=[x]")
        .replace("tokenizer=...", "tokenizer=y")
        .split(" ")
    )
    assert overrides[0] == "data=indexed"
    assert found(f"+recipe={name}", *overrides) == []
