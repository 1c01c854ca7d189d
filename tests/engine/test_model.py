"""Every key reaches Megatron-Core under its name; the fields that no key covers are listed."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest
import torch
from composing import derived, plan_of
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from rank_workers import run_ranks

from mixtrain.config import schema
from mixtrain.engine import model, process_groups
from mixtrain.errors import UserError

MEGATRON = {
    field.name
    for kind in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    for field in fields(kind)
}
# Keys that no Megatron-Core dataclass has: arguments of GPTModel, the schedule, the data and the
# loop.
OURS = {
    "model": {
        "vocab_size",
        "max_position_embeddings",
        "rotary_base",
        "untie_embeddings_and_output_weights",
        "transformer_impl",
        "hf_model",
        "qk_layernorm_over",
        "extra",
    },
    "parallel": {"acknowledged_faults"},
    "router": set(),
    "dispatcher": set(),
    "optimizer": {
        "lr_decay_style",
        "lr_warmup_steps",
        "lr_warmup_fraction",
        "lr_decay_steps",
        "lr_wsd_decay_style",
        "lr_wsd_decay_steps",
    },
}


def keys(section: str) -> set[str]:
    kind = get_type_hints(schema.Config)[section]
    assert is_dataclass(kind)
    return {field.name for field in fields(kind)}


@pytest.mark.parametrize("section", OURS)
def test_every_key_of_a_section_is_a_field_of_megatron_or_known_to_be_ours(section):
    known_to_both = {"rotary_base", "transformer_impl"} & MEGATRON  # 0.19 has fields of these names
    assert keys(section) - MEGATRON == OURS[section] - known_to_both


def test_the_transformer_config_has_what_the_keys_say():
    made = model.transformer_config(
        plan_of(
            "+recipe=mixtral_8x7b_ep8",
            "router.moe_z_loss_coeff=1e-3",
            "router.moe_router_dtype=fp64",
            "dispatcher=allgather",
            "model.layernorm_epsilon=1e-6",
            "trainer.deterministic=true",
        )
    )
    assert (made.num_layers, made.hidden_size, made.moe_ffn_hidden_size, made.kv_channels) == (
        32,
        4096,
        14336,
        128,
    )
    assert (made.num_moe_experts, made.moe_router_topk, made.expert_model_parallel_size) == (
        8,
        2,
        8,
    )
    assert (
        made.moe_router_load_balancing_type,
        made.moe_aux_loss_coeff,
        made.moe_z_loss_coeff,
    ) == (
        "aux_loss",
        0.01,
        1e-3,
    )
    assert (made.moe_router_dtype, made.moe_token_dispatcher_type) == ("fp64", "allgather")
    assert (made.recompute_granularity, made.recompute_method, made.recompute_num_layers) == (
        "full",
        "uniform",
        1,
    )
    assert (
        made.bf16 and made.params_dtype is torch.bfloat16 and made.pipeline_dtype is torch.bfloat16
    )
    assert made.layernorm_epsilon == 1e-6 and made.deterministic_mode
    assert made.gated_linear_unit and made.normalization == "RMSNorm" and not made.add_bias_linear
    assert made.expert_tensor_parallel_size == 1


def test_an_extra_field_reaches_the_transformer_config():
    assert (
        model.transformer_config(plan_of("model.extra.rotary_interleaved=true")).rotary_interleaved
        is True
    )


def test_what_megatron_refuses_and_no_rule_foresaw_is_the_users_to_mend():
    with pytest.raises(UserError, match="Megatron-Core refuses this model"):
        model.transformer_config(derived("model.extra.fp8=nonsense"))


def test_the_interleaved_schedule_never_batches_its_messages():
    plan = plan_of(
        "parallel=ep1",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    )
    assert model.transformer_config(plan).batch_p2p_comm is False


def test_building_takes_no_memory_before_materialise(tmp_path):
    """A stage of the real 8x7B has 7.2 billion parameters, none with storage."""
    plan = plan_of(
        "+recipe=mixtral_8x7b_ep8", "+shrink=laptop", "parallel.expert_model_parallel_size=1"
    )
    big = plan_of(
        "+recipe=mixtral_8x7b_ep8",
        "trainer.num_nodes=2",
        "parallel=ep1",
        "trainer.device_memory_gib=null",
    )

    def count(identity) -> int:
        with process_groups.start(plan, identity), torch.device("meta"):
            built = model.gpt_model(big, model.transformer_config(big), None)
            assert all(parameter.is_meta for parameter in built.parameters())
            return sum(parameter.numel() for parameter in built.parameters())

    assert run_ranks(1, count, tmp_path) == [46_702_792_704] == [big.total_parameters]
