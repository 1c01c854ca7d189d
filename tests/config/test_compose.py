"""Words become one configuration, in the order a user expects; no word that means nothing is taken
in silence.
"""

from __future__ import annotations

import shutil

import pytest
from composing import problems_of, quick_tree_of, run_train, tree_of
from omegaconf import OmegaConf

from mixtrain.config.choices import Mode
from mixtrain.config.compose import CONF, check_overrides, compose, options
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import from_hydra
from mixtrain.errors import UserError

RECIPE = "+recipe=mixtral_8x7b_ep8"


@pytest.fixture
def conf(tmp_path):
    """A copy of conf/ with the recipes in it, to break."""
    return shutil.copytree(CONF, tmp_path / "conf")


def recipe(conf, text: str) -> str:
    """Write a recipe of this text; the override that picks it."""
    (conf / "recipe" / "mine.yaml").write_text(text)
    return "+recipe=mine"


def composed(*overrides: str) -> Config:
    """The configuration of a command line, all of it through Hydra."""
    return from_hydra(tree_of(*overrides))


# Layering


def test_a_recipe_composes_after_the_primary_file():
    config = composed(RECIPE)
    assert (config.name, config.model.hidden_size, config.data.kind.name) == (
        "mixtral_8x7b_ep8",
        4096,
        "mock",
    )
    assert config.run_dir == "runs/mixtral_8x7b_ep8"


def test_shrink_composes_after_the_recipe():
    config = composed(RECIPE, "+shrink=laptop")
    assert (
        config.model.hidden_size,
        config.trainer.num_nodes,
        config.trainer.accelerator.name,
    ) == (128, 1, "cpu")
    assert (
        config.parallel.expert_model_parallel_size,
        config.trainer.recompute_granularity.name,
    ) == (8, "full")
    assert config.run_dir == "runs/mixtral_8x7b_ep8-laptop"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_command_line_wins_over_recipe_and_shrink_wherever_it_stands(place):
    overrides = [RECIPE, "+shrink=laptop"]
    overrides.insert(place, "trainer.max_steps=7")
    assert composed(*overrides).trainer.max_steps == 7


def test_a_group_chosen_on_the_command_line_wins_over_the_recipes_choice():
    config = composed(RECIPE, "parallel=ep2", "dispatcher=allgather")
    assert config.parallel.expert_model_parallel_size == 2
    assert config.dispatcher.moe_token_dispatcher_type.name == "allgather"


@pytest.mark.parametrize(
    "word",
    ["model.extra.foo=1", "+model.extra.foo=1", "++model.extra.foo=1", "model.extra={foo:1}"],
)
def test_any_field_goes_into_model_extra_with_or_without_a_plus(word):
    assert composed(word).model.extra == {"foo": 1}


def test_the_overrides_of_a_job_compose_to_the_same_again():
    words = [RECIPE, "model.extra.foo=1", "data.split='98,1,1'", "run_dir='runs/${name}-b'"]
    (first,), _ = compose(words)
    (second,), problems = compose(first.overrides)
    assert not problems
    assert second == first
    assert first.tree.run_dir == "runs/mixtral_8x7b_ep8-b"


def test_the_tests_quick_way_to_compose_gives_what_hydra_gives():
    overrides = [
        RECIPE,
        "+shrink=laptop",
        "router=sinkhorn",
        "router.moe_aux_loss_coeff=0",
        "data.split='98,1,1'",
    ]
    overrides += [
        "model.extra.foo=[1,2]",
        "trainer.devices=null",
        "name=mine",
        "trainer.recompute_modules=[moe]",
    ]
    assert quick_tree_of(*overrides) == tree_of(*overrides)


# The traps of Hydra


def test_a_lost_folder_of_recipes_is_refused_and_does_not_train_the_default(conf):
    shutil.rmtree(conf / "recipe")
    (problem,) = problems_of(RECIPE, conf=conf)
    assert RECIPE in problem and "has no options" in problem and "checkout" in problem


def test_a_symlink_that_was_checked_out_as_a_text_file_is_refused(conf):
    shutil.rmtree(conf / "recipe")
    (conf / "recipe").write_text("../recipes")
    (problem,) = problems_of(RECIPE, conf=conf)
    assert "has no options" in problem


def test_a_group_that_hydra_took_for_a_plain_key_is_refused_by_the_schema():
    tree = OmegaConf.merge(
        OmegaConf.create(OmegaConf.to_container(tree_of())), {"recipe": "mixtral_8x7b_ep8"}
    )
    with pytest.raises(UserError, match="recipe is not a key of mixtrain"):
        from_hydra(tree)


def test_a_recipe_without_its_global_header_is_refused_key_by_key(conf):
    word = recipe(conf, "name: mine\ntrainer:\n  max_steps: 5\n")
    problems = problems_of(word, conf=conf)
    assert [problem.split(" ")[0] for problem in problems] == [
        "recipe.name",
        "recipe.trainer.max_steps",
    ]
    assert "did you mean trainer.max_steps" in problems[1]


def test_a_recipe_that_invents_a_key_is_refused_with_the_nearest_name(conf):
    word = recipe(
        conf, "# @package _global_\nname: mine\ntrainer:\n  max_stepz: 5\nlearning: {rate: 1}\n"
    )
    problems = problems_of(word, conf=conf)
    assert (
        problems[0] == "trainer.max_stepz is not a key of mixtrain; did you mean trainer.max_steps?"
    )
    assert problems[1].startswith("learning.rate is not a key of mixtrain")
    assert len(problems) == 2


def test_a_recipe_that_picks_an_option_which_is_not_there_is_refused(conf, capfd):
    word = recipe(conf, "# @package _global_\ndefaults:\n  - override /model: mixtral_9x7b\n")
    (problem,) = problems_of(word, conf=conf)
    assert "Hydra could not compose" in problem
    shown = capfd.readouterr().err
    assert "model/mixtral_9x7b" in shown and "mixtral_8x7b" in shown
    assert "Traceback" not in shown


def test_a_recipe_that_picks_two_options_of_a_group_is_refused(conf):
    word = recipe(
        conf, "# @package _global_\ndefaults:\n  - override /router: [aux_loss, seq_aux_loss]\n"
    )
    with pytest.raises(UserError) as refused:
        compose([word], conf)
    (problem,) = refused.value.problems
    assert problem.endswith(
        ".yaml: /router: [aux_loss, seq_aux_loss]: type one option of router; of several only"
        " the last would count; for several auxiliary losses type router=combined"
    )


@pytest.mark.parametrize(
    "overrides, fragments",
    [
        (["recipe=mixtral_8x7b_ep8"], ["recipe=mixtral_8x7b_ep8", "type +recipe=mixtral_8x7b_ep8"]),
        (["shrink=laptop"], ["type +shrink=laptop"]),
        (["+model=mixtral_8x7b"], ["+model=mixtral_8x7b", "type model=mixtral_8x7b"]),
        (
            ["+recipe=mixtral_8x7b_ep9"],
            ["recipe=mixtral_8x7b_ep9", "did you mean mixtral_8x7b_ep8"],
        ),
        (
            ["router=sinkhron"],
            ["router=sinkhron", "did you mean sinkhorn", "options of router are aux_loss, "],
        ),
        (["trainer={max_steps:5}"], ["options of trainer are "]),
        (["model="], ["options of model are"]),
        (
            ["router=[aux_loss,seq_aux_loss]"],
            [
                "router=[aux_loss,seq_aux_loss]: type one option of router",
                "only the last",
                "router=combined",
            ],
        ),
        (["router=[aux_loss]"], ["router=[aux_loss]: type one option of router"]),
        (["+recipe=[mixtral_8x7b_ep8,qwen3_30b_a3b]"], ["type one option of recipe"]),
        (
            ["+shrink=[laptop,parity]"],
            ["type one option of shrink; of several only the last would count"],
        ),
        (["bench=cpu_small"], ["bench=cpu_small: ", "type python tools/bench.py scenario="]),
        (["~trainer.max_steps"], ["~trainer.max_steps", "a key cannot be removed"]),
        (["~model"], ["~model", "a key cannot be removed"]),
        (["+trainer.max_steps=5"], ["+trainer.max_steps", "without the plus"]),
        (["+trainer.max_stepz=5"], ["trainer.max_stepz is not a key", "trainer.max_steps"]),
        (["++trainer.max_stepz=5"], ["trainer.max_stepz is not a key", "trainer.max_steps"]),
        (
            ["trainer.max_stepz=5"],
            ["trainer.max_stepz is not a key", "did you mean trainer.max_steps"],
        ),
        (["max_steps=5"], ["max_steps is not a key", "did you mean trainer.max_steps"]),
        (["model"], ["model cannot be read", "key=value"]),
        (["name=a=b"], ["name=a=b cannot be read", "type name=\"'a=b'\""]),
        (["=5"], ["=5 has no key", "key=value"]),
        (
            ["data.split=90,5,5"],
            ["data.split=90,5,5", "type data.split=\"'90,5,5'\"", "--multirun"],
        ),
        (["model=mixtral_small,mixtral_8x7b"], ["model=mixtral_small,mixtral_8x7b", "--multirun"]),
        (["+shrink=laptop", RECIPE], ["+shrink is before +recipe", "+recipe=... first"]),
    ],
)
def test_a_word_that_hydra_would_misread_or_stop_at_is_refused_with_one_line(overrides, fragments):
    _, (problem,) = check_overrides(overrides)
    assert "\n" not in problem
    for fragment in fragments:
        assert fragment in problem


def test_a_wrong_word_is_kept_from_hydra_and_the_others_are_not(capfd):
    jobs, problems = compose(["trainer.max_stepz=5", "trainer.max_steps=5"])
    assert len(problems) == 1
    assert [job.overrides for job in jobs] == [["trainer.max_steps=5"]]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "word", ["++recipe=mixtral_8x7b_ep8", "hydra.nothing=1", "+recipe@model=mixtral_8x7b_ep8"]
)
def test_what_only_hydra_can_refuse_ends_in_its_reason_without_a_traceback(word, capfd):
    (problem,) = problems_of(word)
    assert "Hydra could not compose" in problem
    shown = capfd.readouterr().err
    assert shown.strip() and "Traceback" not in shown


def test_wrong_words_wrong_values_and_broken_rules_of_words_are_reported_together():
    problems = problems_of(
        "trainer.max_stepz=5", "router=sinkhron", "~name", "x", "trainer.max_steps=many"
    )
    assert [problem.split(" ")[0] for problem in problems] == [
        "trainer.max_stepz",
        "router=sinkhron:",
        "~name:",
        "x",
        "trainer.max_steps",
    ]
    problems = problems_of("trainer.max_stepz=5", "model.moe_router_topk=9")
    assert [problem.split(" ")[0] for problem in problems] == [
        "trainer.max_stepz",
        "model.moe_router_topk",
    ]


# Hydra's own ways keep working


def test_a_sweep_gives_a_job_for_each_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs, problems = compose(["--multirun", "trainer.max_steps=5,6", "trainer.mode=plan"])
    assert not problems
    assert list(tmp_path.iterdir()) == []  # Hydra's sweeper would leave a multirun.yaml
    assert [job.tree.trainer.max_steps for job in jobs] == [5, 6]
    assert [job.overrides for job in jobs] == [
        ["trainer.max_steps=5", "trainer.mode=plan"],
        ["trainer.max_steps=6", "trainer.mode=plan"],
    ]


def test_a_sweep_over_options_takes_a_pattern_and_refuses_an_option_that_is_not_there(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    jobs, problems = compose(["-m", "router=glob(*one)"])
    assert not problems
    assert [job.overrides for job in jobs] == [["router=none"]]
    _, (problem,) = check_overrides(["router=sinkhorn,sinkhron"], multirun=True)
    assert "did you mean sinkhorn" in problem


def test_a_flag_may_stand_between_overrides():
    jobs, problems = compose(["seed=1", "--multirun", "trainer.max_steps=5,6"])
    assert not problems
    assert [job.overrides for job in jobs] == [
        ["seed=1", "trainer.max_steps=5"],
        ["seed=1", "trainer.max_steps=6"],
    ]


def test_the_jobs_of_a_sweep_can_have_a_directory_each():
    jobs, _ = compose(["-m", "router=none,sinkhorn", "run_dir='runs/${name}-${hydra:job.num}'"])
    assert [from_hydra(job.tree).run_dir for job in jobs] == [
        "runs/laptop-0",
        "runs/laptop-1",
    ]


def test_what_only_hydra_knows_has_its_value_under_every_key():
    jobs, _ = compose(
        ["-m", "seed=1,2", "name='n-${hydra:job.num}'", "data.data_path=['a-${hydra:job.num}',b]"]
    )
    configs = [from_hydra(job.tree) for job in jobs]
    assert [config.run_dir for config in configs] == ["runs/n-0", "runs/n-1"]
    assert [config.data.data_path for config in configs] == [["a-0", "b"], ["a-1", "b"]]


@pytest.mark.parametrize("flags", [[], ["--multirun"]])
@pytest.mark.parametrize(
    "where", ["sweep.dir", "sweep.subdir", "runtime.output_dir", "run.dir", "sweep"]
)
def test_a_folder_of_hydras_is_none_of_a_run(where, flags):
    """It is the current one, or one that goes once all is composed."""
    for key in ("run_dir", "data.path_to_cache", "checkpoint.load_weights"):
        with pytest.raises(UserError) as refused:
            compose([*flags, f"{key}='${{hydra:{where}}}/x'"])
        (problem,) = refused.value.problems
        assert problem.startswith(f"{key} = ${{hydra:{where}}}/x is not a permanent directory: ")
        assert problem.endswith("a sweep's to run_dir='runs/${name}-${hydra:job.num}'")


def test_what_hydra_has_no_value_for_is_refused_and_not_none():
    for word in ("run_dir='runs/${hydra:job.num}'", "name='x-${hydra:job.nun}'"):
        with pytest.raises(UserError, match="has no value here; .* of a job of --multirun"):
            compose([word])


@pytest.mark.parametrize(
    "word",
    [
        "hydra.run.dir=out",
        "hydra.run={dir:out}",
        "hydra.sweep.dir=out",
        "hydra.sweep.subdir=x",
        "hydra.output_subdir=x",
        "hydra.job.chdir=true",
        "hydra/launcher=joblib",
        "hydra/launcher=submitit_slurm",
        "+hydra.launcher.n_jobs=2",
        "hydra/sweeper=optuna",
        "hydra.sweeper.max_batch_size=1",
        "hydra.mode=MULTIRUN",
        "+hydra.job.env_set.X=1",
    ],
)
def test_a_setting_of_hydras_that_would_do_nothing_here_is_refused(word):
    _, (problem,) = check_overrides([word], multirun=True)
    assert problem.startswith(f"{word}: ") and ("run" in problem or "shell" in problem)


@pytest.mark.parametrize(
    "word", ["hydra/launcher=basic", "hydra/sweeper=basic", "hydra.job.name=x"]
)
def test_other_settings_of_hydras_are_its_own(word):
    assert check_overrides([word]) == ([word], [])


def test_help_lists_groups_and_keys():
    shown = run_train("--help")
    assert shown.returncode == 0
    for word in ("mixtral_small", "sinkhorn", "recipe", "max_steps"):
        assert word in shown.stdout
    assert shown.stderr == ""


def test_cfg_job_prints_the_composed_configuration():
    shown = run_train("--cfg", "job", RECIPE, "trainer.mode=plan")
    assert shown.returncode == 0
    config = from_hydra(OmegaConf.create(shown.stdout))
    assert config.trainer.mode is Mode.plan
    assert config == composed(RECIPE, "trainer.mode=plan")


def test_cfg_job_does_not_hide_a_wrong_word(capfd):
    with pytest.raises(UserError, match="did you mean trainer.max_steps"):
        compose(["--cfg", "job", "trainer.max_stepz=5"])


WITH_BASE = sorted(path.parent.name for path in CONF.glob("*/_base.yaml"))


@pytest.mark.parametrize("group", WITH_BASE)
def test_an_option_states_only_what_differs_from_its_groups_base(group):
    base = OmegaConf.to_container(OmegaConf.load(CONF / group / "_base.yaml"))
    assert len(WITH_BASE) == 8
    for name in options(group):
        option = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
        assert option.pop("defaults") == ["_base"]
        assert option.keys() <= base.keys(), name
        # sinkhorn says why its coefficient is 0
        same = {key for key, value in option.items() if value == base[key]} - {"moe_aux_loss_coeff"}
        assert same <= {"moe_router_pre_softmax"}, name


def test_the_base_of_a_group_is_not_an_option():
    assert "_base" not in options("router")
    jobs, problems = compose(["router=_base"])
    assert len(problems) == 1 and problems[0].startswith("router=_base: ")
    assert "aux_loss" in problems[0] and "_base," not in problems[0]
