"""What reaches TransformerConfig, and what the plan says is not at its default, against the real
class.
"""

from __future__ import annotations

import dataclasses
import sys

import pytest
from composing import RECIPES, config_of, derived, plan_of
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from rank_workers import run_ranks  # noqa: F401  its import makes Megatron-Core importable without CUDA

from mixtrain.config import transformer_fields as fields
from mixtrain.config.plan_page import render
from mixtrain.config.schema import ModelConfig, ParallelConfig, RouterConfig
from mixtrain.config.transformer_fields import (
    UNKNOWN,
    differences,
    transformer_config_defaults,
    transformer_fields,
)
from mixtrain.engine import model

REAL = {field.name: field for field in dataclasses.fields(TransformerConfig)}
# what transformer_fields gives by name
BY_NAME = ("activation_func", "params_dtype", "pipeline_dtype")
LITERALS = (bool, int, float, str, type(None))
CONFIGURATIONS = {
    "the default": [],
    "bf16": ["trainer.precision=bf16"],
    "virtual pipeline": ["parallel=pp2_vpp2"],
    "layout": ["parallel=ep1", "parallel.pipeline_model_parallel_size=2",
               "parallel.pipeline_model_parallel_layout='Et|tL'", "model.num_layers=2"],
    "several auxiliary losses": ["router=combined"],
    "expert bias": ["router=expert_bias"],
    "padded": ["dispatcher=drop_and_pad"],
    "deterministic": ["trainer.deterministic=true"],
    "extra": ["model.extra.rotary_interleaved=true", "model.extra.window_size=null"],
    **{name: [f"+recipe={name}"] for name in RECIPES},
}  # fmt: skip


def arguments(*overrides: str) -> dict[str, object]:
    """What mixtrain passes to TransformerConfig."""
    values = transformer_fields(plan_of(*overrides).config)
    values |= {name: model.BY_NAME[values[name]] for name in BY_NAME}
    return values | {"attention_backend": AttnBackend[values["attention_backend"]]}


def test_the_source_names_the_fields_that_the_class_has():
    assert set(transformer_config_defaults()) == set(REAL)


def test_every_default_that_the_source_spells_out_is_the_default_of_the_class():
    spelled = {
        name: value for name, value in transformer_config_defaults().items() if value is not UNKNOWN
    }
    named = {
        name: model.BY_NAME.get(value, value)
        for name, value in spelled.items()
        if name == "params_dtype"
    }
    for name, value in (spelled | named).items():
        real = REAL[name].default
        if isinstance(real, LITERALS):
            assert (type(value), value) == (type(real), real), name
        else:
            assert (
                value == real or getattr(real, "__name__", getattr(real, "name", None)) == value
            ), name
    assert len(spelled) > 200


def test_no_default_is_missing_but_those_that_the_source_computes():
    missing = {name for name, value in transformer_config_defaults().items() if value is UNKNOWN}
    assert missing == {"offload_modules", "min_offloaded_tensor_size"}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_real_class_takes_what_a_configuration_sets(name):
    plan = plan_of(*CONFIGURATIONS[name])
    made = model.transformer_config(plan)
    given = arguments(*CONFIGURATIONS[name])
    assert type(made) is TransformerConfig
    filled_in = {"recompute_modules"} if given["recompute_modules"] is None else set()
    for field, value in given.items():
        if field not in filled_in:
            layout = field == "pipeline_model_parallel_layout" and value is not None
            assert (str(getattr(made, field)) if layout else getattr(made, field)) == value, field


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_differences_are_the_values_that_are_not_the_defaults_of_the_class(name):
    listed = [text.split(" = ")[0] for text in differences(plan_of(*CONFIGURATIONS[name]).config)]
    given = arguments(*CONFIGURATIONS[name])
    different = [field for field, value in given.items() if default_of(REAL[field]) != value]
    assert listed == different and len(different) > 10


def default_of(field: dataclasses.Field) -> object:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def test_a_difference_shows_both_values():
    found = differences(config_of("model.layernorm_epsilon=3e-6", "trainer.precision=bf16"))
    assert "layernorm_epsilon = 3e-06 (default: 1e-05)" in found
    assert "params_dtype = bf16 (default: fp32)" in found
    assert "activation_func = silu (default: gelu)" in found
    assert not [text for text in differences(config_of()) if text.startswith("params_dtype")]


@pytest.mark.parametrize(
    "section, kind",
    [("model", ModelConfig), ("parallel", ParallelConfig), ("router", RouterConfig)],
)
def test_every_key_that_is_a_field_reaches_the_class(section, kind):
    names = {field.name for field in dataclasses.fields(kind)} & set(REAL) - {"transformer_impl"}
    assert names <= set(transformer_fields(config_of()))


@pytest.fixture
def without_megatron(monkeypatch):
    """As if megatron-core were not installed: find_spec answers None for a name that sys.modules
    has as None.
    """
    fields._source.cache_clear()
    monkeypatch.setitem(sys.modules, "megatron", None)
    yield
    monkeypatch.undo()
    fields._source.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_megatron_the_plan_is_made_and_says_that_the_defaults_are_not_known(
    precision, without_megatron
):
    assert fields.transformer_config_defaults() is None
    plan = plan_of(f"trainer.precision={precision}")
    assert differences(plan.config) is None
    assert "megatron-core is not installed here" in render(plan)


def test_without_megatron_fp8_plans_too(without_megatron):
    overrides = ["model.transformer_impl=transformer_engine", "trainer.precision=fp8"]
    page = render(derived("+recipe=mixtral_8x7b_ep8", *overrides))
    assert "megatron-core is not installed here" in page


def test_without_megatron_a_field_that_mixtrain_sets_is_still_refused_as_an_extra(without_megatron):
    from composing import problems_in, quick_tree_of

    (problem,) = problems_in(quick_tree_of(), {"model.extra.gated_linear_unit": False})
    assert "model.extra.gated_linear_unit: mixtrain sets this field itself, to true" in problem


def test_without_megatron_a_field_that_does_not_exist_or_does_nothing_is_still_refused(
    without_megatron,
):
    from composing import problems_in, quick_tree_of

    extra = {
        "model.extra.no_such_field": 1,
        "model.extra.use_mup": True,
        "model.extra.moe_extended_tp": True,
    }
    first, *others = problems_in(quick_tree_of(), extra | {"model.extra.softmax_scale": 0.3})
    assert first == "model.extra.no_such_field is not a field of TransformerConfig"
    assert [text.split(" = ")[0] for text in others] == [
        "model.extra.use_mup",
        "model.extra.moe_extended_tp",
    ]
    assert all(text.endswith("; leave it out") for text in others)
