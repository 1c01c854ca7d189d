"""The edges of the rules: every element of their tables has a case, and so has the last value on either side."""

from __future__ import annotations

from dataclasses import replace

import pytest
from composing import config_of

from mixtrain.config import legal_keys
from mixtrain.plan import derive, resolve
from mixtrain.rules import RULES, implementation, launcher, training

RULE = {rule.__name__: rule for rule in RULES}
TE = ("model.transformer_impl=transformer_engine", "trainer.accelerator=gpu")


def problems(rule: str, *overrides: str, **sections: dict) -> list[str]:
    """What a rule says of the default under some overrides, with keys of sections set to values as they are."""
    changed = config_of(*overrides)
    for section, keys in sections.items():
        changed = replace(changed, **{section: replace(getattr(changed, section), **keys)})
    return list(RULE[rule](derive(resolve(changed))))


FLAGS = {  # of sbatch, and whose they are
    "partition": "launcher.partition",
    "account": "launcher.account",
    "time": "launcher.time",
    "gpus-per-node": "launcher.gpus_per_node",
    "nodes": "trainer.num_nodes",
    "ntasks": "trainer.devices",
    "ntasks-per-node": "trainer.devices",
    "container-image": "launcher.container_image",
    "container-mounts": "launcher.container_mounts",
    "output": "run_dir",
    "error": "run_dir",
    "chdir": "run_dir",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_is_set_by_a_key_names_the_key(flag):
    for spelled in (flag, flag.replace("-", "_")):
        (said,) = problems("flags_are_not_ours", launcher={"sbatch_args": {spelled: "x"}})
        key = said.partition("set ")[2].split(",")[0].split(" ")[0]
        assert said.startswith(f"launcher.sbatch_args.{spelled} has a key of its own") and key == FLAGS[flag]
    assert key in legal_keys() and set(launcher.OWN) == set(FLAGS)


@pytest.mark.parametrize("flag", ["wrap", "test-only", "parsable", "wait", "help", "version"])
def test_a_flag_that_makes_sbatch_do_something_else_is_refused(flag):
    (said,) = problems("flags_are_not_ours", launcher={"sbatch_args": {flag: "x"}})
    assert "would make another job" in said
    assert len(launcher.NEVER) == 6


@pytest.mark.parametrize("sign", ["\n", "\r", '"'])
def test_a_flag_has_nothing_that_ends_its_line_or_its_quotes(sign):
    (said,) = problems("flags_are_not_ours", launcher={"sbatch_args": {"comment": f"a{sign}b"}})
    assert "has a line break or a double quote" in said


@pytest.mark.parametrize("flag", ["-comment", "--comment", "Comment", "n", "x1", "9"])
def test_a_flag_is_a_long_name_without_dashes(flag):
    said = problems("flags_are_not_ours", launcher={"sbatch_args": {flag: "x"}})
    assert bool(said) == (flag not in ("n", "x1"))


@pytest.mark.parametrize("key", ["partition", "account"])
def test_a_name_has_letters_and_a_few_signs(key):
    assert problems("names_are_names", launcher={key: "a_b.c,d@e+f-9"}) == []
    for sign in (" ", "'", '"', "\n", ""):
        (said,) = problems("names_are_names", launcher={key: sign})
        assert said.startswith(f"launcher.{key} = ")


@pytest.mark.parametrize(
    "signal, first", [(None, "5:30"), ("USR1@60", "1:30"), ("USR1", "1:30"), ("B:USR1@90", "2:00")]
)
def test_the_shortest_time_is_the_warning_and_half_a_minute(signal, first):
    arguments = {"sbatch_args": {"signal": signal} if signal else {}}
    assert problems("time_leaves_some_to_train", launcher=arguments | {"time": first}) == []
    minutes, seconds = map(int, first.split(":"))
    less = 60 * minutes + seconds - 1
    (said,) = problems("time_leaves_some_to_train", launcher=arguments | {"time": f"{less // 60}:{less % 60}"})
    assert f"is {less} s" in said and f"at least {-(-(less + 1) // 60)} (minutes)" in said


UNCOUNTED = """moe_layer_freq mtp_num_layers multi_latent_attention add_qkv_bias moe_shared_expert_gate
    attention_output_gate heterogeneous_block_specs hetereogenous_dist_checkpoint""".split()


@pytest.mark.parametrize("name", UNCOUNTED)
def test_a_field_that_adds_parameters_is_refused(name):
    (said,) = problems("extra_leaves_the_plan_true", model={"extra": {name: 1}})
    assert said.startswith(f"model.extra.{name}: the plan does not count")
    assert set(training.UNCOUNTED) == set(UNCOUNTED)


UNREAD = """window_size window_attn_skip_freq softmax_type apply_query_key_layer_scaling qk_clip log_max_attention_logit
    qk_l2_norm attention_output_gate experimental_attention_variant linear_attention_freq batch_invariant_mode
    layernorm_zero_centered_gamma fused_residual_rmsnorm apply_residual_connection_post_layernorm use_mup
    glu_linear_offset activation_func_clamp_value use_te_activation_func activation_func_fp8_input_store
    moe_apply_probs_on_input moe_latent_size moe_router_padding_for_fp8 moe_router_padding_for_quantization
    moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size use_kitchen use_kitchen_attention fp4
    use_transformer_engine_op_fuser use_inference_optimized_layers overlap_moe_expert_parallel_comm delay_wgrad_compute
    overlap_dispatch_backward_with_experts_wgrad cp_comm_type hierarchical_context_parallel_sizes""".split()


@pytest.mark.parametrize("name", UNREAD)
def test_a_field_that_the_torch_layers_do_not_read_is_refused(name):
    (said,) = problems("torch_layers_honour_extra", model={"extra": {name: "x"}})
    assert said.startswith(f"model.extra.{name} = x: the layers of model.transformer_impl = torch do not read it")
    assert problems("torch_layers_honour_extra", *TE, model={"extra": {name: "x"}}) == []
    assert set(implementation.NOT_IN_TORCH) == set(UNREAD)


OFFLOADED = ["attn_norm", "attn_proj", "core_attn", "expert_fc1", "mlp_norm", "moe_act", "qkv_linear"]


@pytest.mark.parametrize("name", OFFLOADED)
def test_every_module_that_can_be_offloaded_may_be_named(name):
    modules = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", name]}
    assert problems("offload_needs_transformer_engine", *TE, trainer=modules) == []
    assert set(training.OFFLOAD_MODULES) == set(OFFLOADED)


RECOMPUTED = ["core_attn", "layernorm", "moe", "moe_act", "shared_experts"]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_every_module_that_can_be_recomputed_may_be_named(name):
    words = ("trainer.recompute_granularity=selective", f"trainer.recompute_modules=[{name}]")
    assert problems("selective_recompute_names_modules", *words) == []
    assert set(training.SELECTIVE_MODULES) == set(RECOMPUTED)


def test_rows_of_eight_bit_runs_are_aligned_as_those_of_bf16():
    (said,) = problems("grouped_gemm_reads_aligned_rows", "trainer.precision=fp8", model={"hidden_size": 188})
    assert said.endswith("use 184 or 192")
