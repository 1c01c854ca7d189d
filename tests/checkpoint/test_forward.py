"""Weights are refused for a model with the same shapes and other settings, key by key."""

from __future__ import annotations

import pytest
from composing import config_of, plan_of

from mixtrain.checkpoint import same_model, state
from mixtrain.checkpoint.state import RunState
from mixtrain.config import model_differences
from mixtrain.config.key_effects import CLASSES, FORWARD, MATHEMATICS
from mixtrain.errors import UserError
from mixtrain.interop.convert.checkpoint_config import untrained_state
from mixtrain.launch.machine_checks import weights_problems

# key -> another value than the default model's, with the same shapes if possible
OTHERS = {
    "model.num_attention_heads": 8,
    "model.num_query_groups": 1,
    "model.kv_channels": 8,
    "model.moe_router_topk": 1,
    "model.rotary_base": 10000,
    "model.layernorm_epsilon": 1e-3,
    "model.untie_embeddings_and_output_weights": False,
    "model.qk_layernorm": True,
    "model.qk_layernorm_over": "projection",
    "model.add_qkv_bias": True,
    "model.moe_shared_expert_gate": True,
    "router.moe_router_load_balancing_type": ["sinkhorn"],
    "router.moe_router_score_function": "sigmoid",
    "router.moe_router_pre_softmax": True,
    "router.moe_router_enable_expert_bias": True,
    "router.moe_router_force_load_balancing": True,
    "router.moe_router_num_groups": 2,
    "router.moe_router_group_topk": 1,
    "router.moe_router_topk_scaling_factor": 2.5,
    "dispatcher.moe_expert_capacity_factor": 1.25,
    "dispatcher.moe_token_drop_policy": "position",
}
# Keys of the training or of the shapes: they do not concern weights.
NOT_FORWARD = """
    model.num_layers model.hidden_size model.ffn_hidden_size model.num_moe_experts
    model.moe_ffn_hidden_size model.moe_shared_expert_intermediate_size model.vocab_size
    model.max_position_embeddings model.init_method_std router.moe_aux_loss_coeff
    router.moe_z_loss_coeff router.moe_input_jitter_eps router.moe_router_bias_update_rate
    router.moe_router_dtype
""".split()


def stored(folder, **changes):
    """A release directory with the state of the default model, except for keys (dots are __)."""
    values = untrained_state(config_of()).config
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    (folder / "release").mkdir(exist_ok=True)
    (folder / "release" / state.NAME).write_text(state.to_json(RunState(config=values)))
    return folder / "release"


def test_every_key_of_the_models_mathematics_is_compared_or_known_not_to_be():
    sections = ("model.", "router.", "dispatcher.")
    keys = {key for key in CLASSES[MATHEMATICS] if key.startswith(sections)} - {"model.extra"}
    assert keys == {*FORWARD, *NOT_FORWARD} and not {*FORWARD} & {*NOT_FORWARD}


@pytest.mark.parametrize("key", FORWARD)
def test_a_difference_is_refused_with_both_values_unless_its_key_is_acknowledged(key, tmp_path):
    changes = {key.replace(".", "__"): OTHERS[key]}
    drops = (
        {}
        if key != "dispatcher.moe_token_drop_policy"
        else {"dispatcher__moe_expert_capacity_factor": 1.5}
    )
    overrides = ["dispatcher.moe_expert_capacity_factor=1.5"] if drops else []
    checkpoint = stored(tmp_path, **changes, **drops)
    config = config_of(*overrides)
    with pytest.raises(UserError) as refusal:
        same_model.refuse_differences(config, checkpoint)
    (problem,) = refusal.value.problems
    section, name = key.split(".")
    own_value = model_differences._shown(model_differences.value_of(config, key))
    assert problem.startswith(
        f"{key} = {own_value}, but the weights of {checkpoint} are for"
        f" {model_differences._shown(OTHERS[key])}"
    )
    assert problem.endswith("or name the key in checkpoint.acknowledge_differences")
    same_model.refuse_differences(
        config_of(*overrides, f"checkpoint.acknowledge_differences=[{key}]"), checkpoint
    )


def test_the_same_model_is_not_refused_whatever_its_training_was(tmp_path):
    training = {
        "router__moe_aux_loss_coeff": [0.5],
        "router__moe_input_jitter_eps": 0.1,
        "optimizer__lr": 1.0,
    }
    checkpoint = stored(tmp_path, **training, router__moe_router_topk_scaling_factor=1.0)
    same_model.refuse_differences(config_of(), checkpoint)
    same_model.refuse_differences(
        config_of("router.moe_router_load_balancing_type=[seq_aux_loss]"), checkpoint
    )


def test_a_bias_that_starts_is_no_difference_and_one_that_ends_is(tmp_path):
    with_bias = ["router=expert_bias"]
    key = "router.moe_router_enable_expert_bias"
    alike = stored(tmp_path, router__moe_router_score_function="sigmoid")
    assert same_model.problems(config_of(*with_bias), alike) == []
    biased = stored(
        tmp_path,
        router__moe_router_score_function="sigmoid",
        router__moe_router_enable_expert_bias=True,
    )
    assert same_model.problems(config_of(*with_bias), biased) == []
    (problem,) = same_model.problems(config_of("router.moe_router_score_function=sigmoid"), biased)
    assert problem.startswith(f"{key} = false, but the weights of {biased} are for true")


def test_a_field_of_extra_is_compared_with_its_default(tmp_path):
    checkpoint = stored(
        tmp_path, model__extra={"rotary_interleaved": True, "layernorm_zero_centered_gamma": False}
    )
    with pytest.raises(
        UserError, match=r"model.extra.rotary_interleaved = false, .* are for true"
    ) as refusal:
        same_model.refuse_differences(config_of(), checkpoint)
    assert len(refusal.value.problems) == 1
    same_model.refuse_differences(config_of("+model.extra.rotary_interleaved=true"), checkpoint)
    same_model.refuse_differences(
        config_of("checkpoint.acknowledge_differences=[model.extra.rotary_interleaved]"), checkpoint
    )


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(tmp_path):
    with pytest.raises(UserError, match="run_state.json is missing: .*cannot be compared"):
        same_model.refuse_differences(config_of(), tmp_path)


@pytest.mark.parametrize("config", [{}, {"model": 5}, {"model": {}, "router": None}], ids=str)
def test_a_state_without_the_keys_is_refused_for_each(config, tmp_path):
    (tmp_path / state.NAME).write_text(state.to_json(state.RunState(config=config)))
    with pytest.raises(UserError) as refusal:
        same_model.refuse_differences(config_of(), tmp_path)
    assert "model.rotary_base = 1000000, but" in str(refusal.value) and "an unknown value" in str(
        refusal.value
    )
    # the policy has no effect if no token is dropped; older checkpoints have a value for some keys
    assert len(refusal.value.problems) == len(FORWARD) - 1 - len(model_differences.OLDER)


def test_it_is_said_before_any_rank_starts_unless_the_run_goes_on_from_its_own(tmp_path):
    stored(tmp_path, model__rotary_base=10000)
    (tmp_path / "release" / "integrity.json").write_text("{}")
    overrides = [f"checkpoint.load_weights={tmp_path / 'release'}", f"run_dir={tmp_path / 'run'}"]
    (problem,) = weights_problems(plan_of(*overrides))
    assert (
        problem.startswith("model.rotary_base = 1000000, but the weights of")
        and "are for 10000" in problem
    )
    (tmp_path / "run" / "iter_0000002").mkdir(parents=True)
    assert [*weights_problems(plan_of(*overrides))] == []
