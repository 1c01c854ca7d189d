"""Every key has a name, a type and, in conf/, a value; what does not fit is reported completely,
each with its key.
"""

from __future__ import annotations

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import get_type_hints

import pytest
from composing import RECIPES, config_of, problems_in, tree_of
from omegaconf import MISSING, DictConfig, OmegaConf

from mixtrain.config.compose import CONF, options
from mixtrain.config.schema import FREE, Config, legal_keys
from mixtrain.config.typed_config import from_hydra, plain, to_yaml, unknown_key
from mixtrain.errors import UserError

SECTIONS = sorted({key.split(".")[0] for key in legal_keys() if "." in key})
OPTIONS = [(section, option) for section in SECTIONS for option in options(section)]
TO_BE_TYPED = {("data", "indexed"): {"data_path", "tokenizer"}}  # what no file can know


@pytest.fixture(scope="module")
def default_tree():
    return tree_of()


@pytest.fixture(scope="module")
def default(default_tree):
    return from_hydra(default_tree)


def test_every_key_has_a_value_in_the_default(default_tree):
    assert OmegaConf.missing_keys(default_tree) == set()
    for key in legal_keys():
        assert OmegaConf.select(default_tree, key, default="absent") != "absent", key


def option_of(section: str, option: str) -> DictConfig:
    """The values of an option, with those of the options of its section that it starts from."""
    values = OmegaConf.load(CONF / section / f"{option}.yaml")
    bases = [base for base in values.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*[option_of(section, base) for base in bases], values)


@pytest.mark.parametrize("section, option", OPTIONS)
def test_an_option_has_a_value_for_every_key_of_its_section_and_no_other(section, option):
    values = option_of(section, option)
    keys = [
        key.removeprefix(f"{section}.") for key in legal_keys() if key.startswith(f"{section}.")
    ]
    assert sorted(values) == sorted(keys)
    assert OmegaConf.missing_keys(values) == TO_BE_TYPED.get((section, option), set())


def test_no_dataclass_holds_a_value():
    def check(section: type) -> None:
        hints = get_type_hints(section)
        for entry in fields(section):
            if is_dataclass(hints[entry.name]):
                check(hints[entry.name])
            elif entry.name in ("extra", "sbatch_args"):
                assert entry.default_factory is dict
            else:
                assert entry.default == MISSING and entry.default_factory is NO_DEFAULT, entry.name

    check(Config)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_lost_is_reported_key_by_key(default_tree, section):
    tree = OmegaConf.create(OmegaConf.to_container(default_tree))
    del tree[section]
    keys = {key for key in legal_keys() if key.startswith(f"{section}.")} - set(FREE)
    assert {problem.split(" has no value")[0] for problem in problems_in(tree)} == keys


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("trainer.max_steps", "many", "trainer.max_steps = many must be a whole number"),
        ("trainer.max_steps", 1.5, "trainer.max_steps = 1.5 must be a whole number"),
        ("trainer.max_steps", True, "trainer.max_steps = True must be a whole number"),
        ("trainer.max_steps", None, "trainer.max_steps = null must be a whole number"),
        ("trainer.max_steps", [1, 2], "trainer.max_steps = [1, 2] must be a whole number"),
        ("trainer.devices", "few", "trainer.devices = few must be a whole number or null"),
        ("trainer.devices", 2.0, "trainer.devices = 2.0 must be a whole number or null"),
        ("optimizer.lr", "fast", "optimizer.lr = fast must be a number"),
        ("optimizer.lr", True, "optimizer.lr = True must be a number"),
        ("router.moe_z_loss_coeff", "x", "router.moe_z_loss_coeff = x must be a number or null"),
        (
            "parallel.sequence_parallel",
            "perhaps",
            "parallel.sequence_parallel = perhaps must be true or false",
        ),
        ("parallel.sequence_parallel", 2, "parallel.sequence_parallel = 2 must be true or false"),
        ("trainer.precision", "bf61", "trainer.precision = bf61 must be one of fp32, bf16, fp8"),
        ("trainer.precision", 2, "trainer.precision = 2 must be one of fp32, bf16, fp8"),
        (
            "trainer.recompute_granularity",
            "half",
            "trainer.recompute_granularity = half must be one of full, selective or null",
        ),
        (
            "dispatcher.moe_token_drop_policy",
            None,
            "dispatcher.moe_token_drop_policy = null must be one of probs, position",
        ),
        ("data.data_path", "corpus", "data.data_path = corpus must be a list, as in [a,b] or null"),
        ("data.split", [90, 5, 5], "data.split = [90, 5, 5] must be text"),
        ("model.extra", "x", "model.extra = x must be a mapping, as in {field: value}"),
        ("model.extra", None, "model.extra = null must be a mapping, as in {field: value}"),
    ],
)
def test_a_wrong_type_is_named_with_what_it_must_be(default_tree, key, value, wanted):
    assert problems_in(default_tree, {key: value}) == [wanted]


MINIMA = {  # of each type of key with a minimum
    "seed": -1,
    "model.num_layers": 0,
    "parallel.virtual_pipeline_model_parallel_size": 1,
    "optimizer.lr": -0.1,
    "optimizer.clip_grad": -0.5,
    "trainer.limit_val_batches": -1,
    "trainer.device_memory_gib": -80.5,
}


@pytest.mark.parametrize("key", MINIMA)
def test_a_value_below_the_minimum_is_named_with_the_minimum(default_tree, key):
    (problem,) = problems_in(default_tree, {key: MINIMA[key]})
    assert problem.startswith(f"{key} = {MINIMA[key]} must be at least ")


def test_what_does_not_fit_is_all_reported_at_once(default_tree):
    changes = {
        # as only a YAML file can bring it in: the command line is checked before
        "trainer.max_stepz": 5,
        "router.colour": "red",
        "optimizer.lr": "fast",
        "trainer.precision": "bf61",
        "model.hidden_size": MISSING,
        "model.vocab_size": 0,
        "optimizer.min_lr": -1,
    }
    problems = problems_in(default_tree, changes)
    assert {problem.split(" ")[0] for problem in problems} == set(changes)
    assert len(problems) == len(changes)
    (misspelt,) = [problem for problem in problems if "max_stepz" in problem]
    assert misspelt == "trainer.max_stepz is not a key of mixtrain; did you mean trainer.max_steps?"


def test_problems_known_before_stand_first(default_tree):
    tree = OmegaConf.merge(default_tree)
    tree.trainer.max_steps = 0
    with pytest.raises(UserError) as refused:
        from_hydra(tree, ["a word that Hydra cannot read"])
    assert refused.value.problems == (
        "a word that Hydra cannot read",
        "trainer.max_steps = 0 must be at least 1",
    )


@pytest.mark.parametrize(
    "reference", ["runs/${nobody}", "runs/${data}/${nobody.there}", "${run_dir}"]
)
def test_a_reference_to_nothing_is_refused_with_its_key(default_tree, reference):
    (problem,) = problems_in(default_tree, {"run_dir": reference})
    assert problem.startswith("run_dir") and "\n" not in problem


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("trainer.max_stepz", "trainer.max_steps"),
        ("max_steps", "trainer.max_steps"),
        ("optimizer.learning_rate", None),
        ("model.num_layer", "model.num_layers"),
        ("trainer.expert_model_parallel_size", "parallel.expert_model_parallel_size"),
        ("moe_router_top_k", "model.moe_router_topk"),
        ("xyz", None),
    ],
)
def test_an_unknown_key_offers_the_nearest_names(typed, meant):
    problem = unknown_key(typed)
    assert problem.startswith(f"{typed} is not a key of mixtrain; ")
    if meant:
        assert f"did you mean {meant}" in problem
    assert ("--help" in problem) == (meant is None)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.extra.moe_layer_freq=[1,0]", "name='1e3'", "optimizer.clip_grad=1e-30"],
        *[[f"+recipe={name}"] for name in RECIPES],
        *[[f"+recipe={name}", "+shrink=laptop"] for name in RECIPES],
    ],
    ids=str,
)
def test_the_yaml_of_a_config_reads_back_to_the_same_config(overrides):
    config = config_of(*overrides)
    assert from_hydra(OmegaConf.create(to_yaml(config))) == config


def test_a_config_holds_the_types_it_names(default):
    for key, kind in legal_keys().items():
        if isinstance(kind, type) and issubclass(kind, Enum):
            section, name = key.split(".")
            assert isinstance(getattr(getattr(default, section), name), kind), key


def test_plain_values_name_their_choices(default):
    assert plain([default.trainer.mode, 1, "a", None]) == ["train", 1, "a", None]
