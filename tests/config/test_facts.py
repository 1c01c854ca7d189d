"""A recipe is the model it names: a difference is a warning that names its key, and so is each
published mistake.
"""

from __future__ import annotations

import pytest
from composing import RECIPES, config_of, derived, problems_of

from mixtrain.config import published_models
from mixtrain.config.compose import options
from mixtrain.config.families import FAMILIES
from mixtrain.config.key_effects import show
from mixtrain.config.plan_page import WIDTH, render
from mixtrain.config.published_models import KEYS, published
from mixtrain.paths import CONF

MIXTRAL = "+recipe=mixtral_8x7b_ep8"
NVIDIA = "+recipe=mixtral_8x7b_tp1_pp4_ep8"
SLICE = "mixtral_8x7b_4layers_1gpu"  # not a published model: it names none
WHOLE = [name for name in RECIPES if name != SLICE]

# What the models' pages round to 46.7 B, 141 B, 6.9 B, 14.3 B and 30.5 B
PARAMETERS = {
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "mistral-community/Mixtral-8x22B-v0.1": 140_620_634_112,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
}


def warnings(*overrides: str) -> list[str]:
    return published_models.warnings(config_of(*overrides))


def words(key: str, value: object) -> str:
    """An override."""
    return f"{key}={show(value)}"


OTHERS = {"softmax": "sigmoid", "head": "projection"}


def another(value: object) -> object:
    """A value of the same type that is not this one."""
    if isinstance(value, bool):
        return not value
    if value is None:
        return 128
    return OTHERS[value] if isinstance(value, str) else value * 2


# The facts


def test_each_published_model_has_its_published_size_and_no_warnings():
    assert published().keys() == PARAMETERS.keys()
    for name, values in published().items():
        overrides = [words(key, value) for key, value in values.items()]
        assert derived(*overrides).total_parameters == PARAMETERS[name]
        assert warnings(f"model.hf_model={name}", *overrides) == []


def test_the_model_whose_file_a_published_model_has_names_its_source():
    for family in FAMILIES.values():
        for option, _ in family.published.values():
            text = (CONF / "model" / f"{option}.yaml").read_text()
            source = text.partition(", config.json")[0].removeprefix("# ")
            assert published()[source]["model.num_layers"] > 0


# Recipes and options are what they say they are


@pytest.mark.parametrize("recipe", [[], *[[f"+recipe={name}"] for name in RECIPES]], ids=str)
@pytest.mark.parametrize("shrink", [[], ["+shrink=laptop"]], ids=str)
def test_a_recipe_has_no_warnings_shrunk_or_not(recipe, shrink):
    assert warnings(*recipe, *shrink) == []


@pytest.mark.parametrize("name", WHOLE)
def test_a_recipe_names_the_model_it_is(name):
    assert config_of(f"+recipe={name}").model.hf_model in published()


# an option of model says nothing of the router
ROUTER = dict.fromkeys(["olmoe_1b_7b", "qwen15_moe_a27b"], ["router.moe_router_pre_softmax=true"])


@pytest.mark.parametrize("option", options("model"))
def test_an_option_of_model_is_the_model_it_names(option):
    config = config_of(f"model={option}", *ROUTER.get(option, []))
    assert published_models.warnings(config) == []
    assert (config.model.hf_model in published()) == (option != "mixtral_small")


def test_the_slice_differs_from_mixtral_in_its_layers_alone():
    named = [f"+recipe={SLICE}", "model.hf_model=mistralai/Mixtral-8x7B-v0.1"]
    assert warnings(*named) == [
        "model.num_layers = 4 differs from mistralai/Mixtral-8x7B-v0.1, which has 32",
    ]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", WHOLE)
def test_one_changed_fact_is_one_warning_with_its_key_and_both_values(name, key):
    model = config_of(f"+recipe={name}").model.hf_model
    fact = published()[model][key]
    changed = another(fact)
    (warning,) = warnings(f"+recipe={name}", words(key, changed))
    assert (
        warning
        == f"{words(key, changed)} differs from {model}, which has {words('', fact)[1:]}".replace(
            "=", " = "
        )
    )


def test_a_shrunk_recipe_that_still_names_its_model_is_told_each_size():
    told = warnings(
        MIXTRAL,
        "+shrink=laptop",
        "model.hf_model=mistralai/Mixtral-8x7B-v0.1",
        "model.num_layers=2",
    )
    assert [warning.split(" = ")[0] for warning in told] == [
        f"model.{key}"
        for key in (
            "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels"
            " moe_ffn_hidden_size vocab_size max_position_embeddings"
        ).split()
    ]  # the query groups are 8 in both


# What others published

EIGHT_7B = "differs from mistralai/Mixtral-8x7B-v0.1"
EIGHT_22B = "differs from mistral-community/Mixtral-8x22B-v0.1"

# who, the recipe with their value, the start and the end of the warning

PUBLISHED_MISTAKES = [
    (
        "Megatron-MoE-ModelZoo, Mixtral-8x7B",
        [NVIDIA, "model.rotary_base=10000"],
        f"model.rotary_base = 10000 {EIGHT_7B}",
        "which has 1000000",
    ),
    (
        "Megatron-MoE-ModelZoo, Mixtral-8x22B",
        ["+recipe=mixtral_8x22b_tp2_pp8_ep8", "model.rotary_base=10000"],
        f"model.rotary_base = 10000 {EIGHT_22B}",
        "which has 1000000",
    ),
    (
        "Megatron-LM, mixtral_8x22b_tp2pp8ep8vpp1_release",
        ["+recipe=mixtral_8x22b_tp2_pp8_ep8", "model.max_position_embeddings=4096"],
        f"model.max_position_embeddings = 4096 {EIGHT_22B}",
        "which has 65536",
    ),
    (
        "Megatron-LM, mixtral_8x7b_alltoall_tp2pp4ep4_release",
        ["+recipe=mixtral_8x7b_tp2_pp4_ep4", "model.vocab_size=256000"],
        f"model.vocab_size = 256000 {EIGHT_7B}",
        "which has 32000",
    ),
    (
        "Megatron's default without --group-query-attention",
        [MIXTRAL, "model.num_query_groups=32"],
        f"model.num_query_groups = 32 {EIGHT_7B}",
        "which has 8",
    ),
    (
        "another model's epsilon",
        [MIXTRAL, "model.layernorm_epsilon=1e-6"],
        f"model.layernorm_epsilon = 1e-06 {EIGHT_7B}",
        "which has 1e-05",
    ),
    (
        "AWS, smp-train-mixtral-fsdp-ep",
        ["+recipe=mixtral_8x7b_ep8_sinkhorn", "model.vocab_size=50257"],
        f"model.vocab_size = 50257 {EIGHT_7B}",
        "which has 32000",
    ),
    (
        "AWS, its default size",
        [MIXTRAL, "model.num_layers=8"],
        f"model.num_layers = 8 {EIGHT_7B}",
        "which has 32",
    ),
    (
        "AWS, its default size",
        [MIXTRAL, "model.num_moe_experts=4"],
        f"model.num_moe_experts = 4 {EIGHT_7B}",
        "which has 8",
    ),
    (
        "NeMo, MixtralConfig",
        [NVIDIA, "router.moe_router_pre_softmax=true"],
        f"router.moe_router_pre_softmax = true {EIGHT_7B}",
        "which has false",
    ),
    (
        "NeMo-Framework-Launcher, mixtral_8x7b",
        [NVIDIA, "dispatcher.moe_expert_capacity_factor=1.0"],
        "dispatcher.moe_expert_capacity_factor = 1 drops the tokens",
        "use null",
    ),
    (
        "NeMo, performance mode",
        [
            NVIDIA,
            "dispatcher.moe_expert_capacity_factor=1.0",
            "dispatcher.moe_pad_expert_input_to_capacity=true",
        ],
        "dispatcher.moe_expert_capacity_factor = 1 drops the tokens",
        "use null",
    ),
    (
        "a benchmark's switch left on",
        [MIXTRAL, "router.moe_router_force_load_balancing=true"],
        "router.moe_router_force_load_balancing = true",
        "only for timing",
    ),
    (
        "the same, on a model without a name",
        ["router.moe_router_force_load_balancing=true"],
        "router.moe_router_force_load_balancing = true",
        "only for timing",
    ),
]


@pytest.mark.parametrize("who, overrides, start, end", PUBLISHED_MISTAKES, ids=str)
def test_a_published_mistake_is_caught_by_name_and_shown_on_top_of_the_plan(
    who, overrides, start, end
):
    (warning,) = warnings(*overrides)
    assert warning.startswith(start) and warning.endswith(end)
    top = render(derived(*overrides)).split("\nrun ")[0]
    assert " ".join(top.split()).endswith(f"warning: {warning}")
    assert max(map(len, top.splitlines())) <= WIDTH


# who, the recipe with their layout, what the refusal says: these are no question of the model and
# cannot run fmt: off
PUBLISHED_LAYOUTS = [
    (
        "Megatron-LM, train_mixtral_8x7b_distributed.sh: one node for a layout of 32 GPUs",
        [NVIDIA, "trainer.num_nodes=1"],
        "ETP*EP*PP = 32; use 32 ranks",
    ),
    (
        "AWS: two experts' ranks, without FSDP",
        ["+recipe=mixtral_8x7b_ep8_sinkhorn", "parallel.expert_model_parallel_size=2"],
        "more than trainer.device_memory_gib = 79",
    ),
    (
        "AWS: sinkhorn beside an auxiliary loss",
        ["+recipe=mixtral_8x7b_ep8_sinkhorn", "router.moe_aux_loss_coeff=0.01"],
        "router.moe_aux_loss_coeff=0",
    ),
    (
        "NeMo: sequence parallelism at TP 1",
        [NVIDIA, "parallel.sequence_parallel=true"],
        "does nothing at parallel.tensor_model_parallel_size = 1",
    ),
    (
        "vocabulary 50257 over two tensor ranks",
        ["+recipe=mixtral_8x7b_tp2_pp4_ep4", "model.vocab_size=50257"],
        "never padded silently: use 50256 or 50258",
    ),
]


@pytest.mark.parametrize("who, overrides, refusal", PUBLISHED_LAYOUTS, ids=str)
def test_a_published_layout_that_cannot_run_is_refused(who, overrides, refusal):
    assert [problem for problem in problems_of(*overrides) if refusal in problem]


def test_several_mistakes_are_several_warnings():
    told = warnings(
        MIXTRAL, "model.rotary_base=10000", "model.num_query_groups=32", "model.vocab_size=50257"
    )
    assert len(told) == 3


def test_a_model_without_facts_is_told_which_there_are():
    (warning,) = warnings(MIXTRAL, "model.hf_model=mistralai/Mixtral-9x9B")
    assert warning.startswith("model.hf_model = mistralai/Mixtral-9x9B is not a known model")
    assert all(name in warning for name in published())


def test_a_model_of_the_users_own_is_held_against_nothing():
    assert warnings("dispatcher.moe_expert_capacity_factor=1.0", "model.rotary_base=10000") == []
