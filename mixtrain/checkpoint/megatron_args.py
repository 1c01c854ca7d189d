"""The `args` that Megatron-LM's loader reads from a checkpoint: a run's settings under its names.

Rule: plain values in an argparse.Namespace, the only class that a restricted unpickler accepts.
With None, Megatron-LM keeps the value of its command line.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from mixtrain.checkpoint.state import RunState
from mixtrain.config.choices import Accelerator, DataKind, OptimizerName, Precision
from mixtrain.config.plan import Plan
from mixtrain.config.transformer_fields import transformer_fields
from mixtrain.config.typed_config import plain

# how the optimizer state is sharded, which Megatron-LM reads from a checkpoint
FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
CHECKPOINT_VERSION = 3.0  # Megatron-LM's number for query, key and value interleaved by group
Row = Callable[[Plan, RunState], Any]


def _keys(section: str, names: str) -> dict[str, Row]:
    """Return rows for the keys of a configuration section that have Megatron-LM's names."""
    return {name: partial(_key, section, name) for name in names.split()}


def _key(section: str, name: str, plan: Plan, state: RunState) -> Any:
    return getattr(getattr(plan.config, section), name)


def _always(**values: Any) -> dict[str, Row]:
    """Return rows that have the same value in every run of mixtrain."""
    return {name: lambda plan, state, value=value: value for name, value in values.items()}


def _field(name: str, default: Any = None) -> Row:
    """Return a row for a field of TransformerConfig, which model.extra may set."""
    return lambda plan, state: transformer_fields(plan.config).get(name, default)


def layers_per_virtual_stage(plan: Plan) -> int | None:
    """Return --num-layers-per-virtual-pipeline-stage, or None if the pipeline is uneven.

    An embedding or loss in a layer's place counts as a layer. For an uneven pipeline Megatron-LM
    has other arguments.
    """
    parallel = plan.config.parallel
    layers = plan.config.model.num_layers
    virtual_stages = parallel.virtual_pipeline_model_parallel_size or 0
    chunks = virtual_stages * parallel.pipeline_model_parallel_size
    uneven = (
        parallel.num_layers_in_first_pipeline_stage or parallel.num_layers_in_last_pipeline_stage
    )
    if not chunks or uneven or parallel.pipeline_model_parallel_layout:
        return None
    layers += (
        parallel.account_for_embedding_in_pipeline_split
        + parallel.account_for_loss_in_pipeline_split
    )
    return layers // chunks


def tokenizer_type(plan: Plan) -> str | None:
    """Return Megatron-LM's tokenizer type; None for data=stdlib, whose tokenizer is in a cache."""
    data = plan.config.data
    if data.tokenizer:
        return "HuggingFaceTokenizer"
    return "NullTokenizer" if data.kind is DataKind.mock else None


# what --use-checkpoint-args sets
MODEL: dict[str, Row] = {
    **_keys(
        "model",
        """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
        max_position_embeddings rotary_base untie_embeddings_and_output_weights moe_router_topk
        moe_ffn_hidden_size moe_grouped_gemm moe_shared_expert_intermediate_size vocab_size
        init_method_std qk_layernorm""",
    ),
    **_keys(
        "router",
        """
        moe_router_pre_softmax moe_router_score_function moe_router_enable_expert_bias
        moe_router_topk_scaling_factor moe_z_loss_coeff moe_input_jitter_eps
        moe_router_bias_update_rate moe_router_force_load_balancing moe_router_dtype
        moe_router_num_groups moe_router_group_topk""",
    ),
    **_keys(
        "dispatcher",
        """
        moe_token_dispatcher_type moe_expert_capacity_factor moe_pad_expert_input_to_capacity
        moe_token_drop_policy moe_shared_expert_overlap""",
    ),
    "moe_router_load_balancing_type": _field("moe_router_load_balancing_type"),
    "moe_aux_loss_coeff": _field("moe_aux_loss_coeff"),
    "num_experts": lambda plan, state: plan.config.model.num_moe_experts,
    "group_query_attention": lambda plan, state: (
        plan.config.model.num_query_groups != plan.config.model.num_attention_heads
    ),
    "layernorm_epsilon": lambda plan, state: plan.config.model.layernorm_epsilon,
    "normalization": _field("normalization"),
    "swiglu": _field("gated_linear_unit"),
    "apply_layernorm_1p": _field("layernorm_zero_centered_gamma", False),
    "layernorm_zero_centered_gamma": _field("layernorm_zero_centered_gamma", False),
    "add_bias_linear": _field("add_bias_linear"),
    "disable_bias_linear": lambda plan, state: (
        not transformer_fields(plan.config)["add_bias_linear"]
    ),
    "add_qkv_bias": _field("add_qkv_bias", False),
    "attention_dropout": _field("attention_dropout"),
    "hidden_dropout": _field("hidden_dropout"),
    "apply_query_key_layer_scaling": _field("apply_query_key_layer_scaling", False),
    "moe_layer_freq": _field("moe_layer_freq", 1),
    "moe_latent_size": _field("moe_latent_size"),
    "rotary_interleaved": _field("rotary_interleaved", False),
    **_always(
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_percent=1.0,
        squared_relu=False,
        # the keys of Transformer Engine's modules, which are those on disk
        transformer_impl="transformer_engine",
    ),
    "seq_length": lambda plan, state: plan.config.data.seq_length,
    "tokenizer_type": lambda plan, state: tokenizer_type(plan),
    "tokenizer_model": lambda plan, state: plan.config.data.tokenizer,
    "padded_vocab_size": lambda plan, state: plan.config.model.vocab_size,
    **_always(make_vocab_size_divisible_by=1),  # vocab_size is padded already
    # settings of models that mixtrain does not train
    **_always(
        **dict.fromkeys(
            """
        spec mtp_num_layers mtp_use_repeated_layer mtp_hybrid_override_pattern
        hybrid_override_pattern hybrid_layer_pattern hybrid_attention_ratio hybrid_mlp_ratio
        is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
        heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
        moe_single_grouped_weight moe_single_grouped_bias tiktoken_pattern""".split()
        )
    ),
}

# what --use-mp-args-from-checkpoint-args sets, and what the loader compares
LAYOUT: dict[str, Row] = {
    **_keys(
        "parallel",
        """
        tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
        context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
        sequence_parallel num_distributed_optimizer_instances
        account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split pipeline_model_parallel_layout""",
    ),
    "num_layers_per_virtual_pipeline_stage": lambda plan, state: layers_per_virtual_stage(plan),
    "decoder_first_pipeline_num_layers": lambda plan, state: (
        plan.config.parallel.num_layers_in_first_pipeline_stage
    ),
    "decoder_last_pipeline_num_layers": lambda plan, state: (
        plan.config.parallel.num_layers_in_last_pipeline_stage
    ),
    "world_size": lambda plan, state: plan.world_size,
    "data_parallel_size": lambda plan, state: plan.data_parallel_size,
    "use_megatron_fsdp": lambda plan, state: (
        plan.config.parallel.data_parallel_sharding_strategy is not None
    ),
}

TRAINING: dict[str, Row] = {
    **_keys(
        "optimizer",
        """
        optimizer lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad
        use_distributed_optimizer overlap_grad_reduce overlap_param_gather lr_decay_style
        lr_wsd_decay_style""",
    ),
    "lr_warmup_iters": lambda plan, state: plan.config.optimizer.lr_warmup_steps,
    "lr_decay_iters": lambda plan, state: plan.config.optimizer.lr_decay_steps,
    "lr_wsd_decay_iters": lambda plan, state: plan.config.optimizer.lr_wsd_decay_steps,
    "accumulate_allreduce_grads_in_fp32": lambda plan, state: (
        plan.config.optimizer.grad_reduce_in_fp32
    ),
    **_keys("trainer", "micro_batch_size global_batch_size rampup_batch_size"),
    "train_iters": lambda plan, state: plan.config.trainer.max_steps,
    "seed": lambda plan, state: plan.config.seed,
    "bf16": lambda plan, state: plan.config.trainer.precision is not Precision.fp32,
    "fp8": _field("fp8"),
    **_always(fp16=False, data_parallel_random_init=False),
}

PROGRESS: dict[str, Row] = {
    "iteration": lambda plan, state: state.step,
    "consumed_train_samples": lambda plan, state: state.consumed_samples,
    # every validation reads the same sequences from the beginning
    **_always(consumed_valid_samples=0, skipped_train_samples=0),
}

CHECKPOINT: dict[str, Row] = {
    **_always(
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        ckpt_fully_parallel_save=True,
        dist_ckpt_optim_fully_reshardable=True,
        distrib_optim_fully_reshardable_mem_efficient=False,
        async_strategy="mcore",
    ),
    **_keys("checkpoint", "async_save"),
    # the format is that of the distributed optimizer, which Megatron-Core supports only with Adam
    "no_save_optim": lambda plan, state: plan.config.optimizer.optimizer is not OptimizerName.adam,
    # Megatron-LM expects the state of a GPU's generator, which a CPU run does not have
    "no_save_rng": lambda plan, state: plan.config.trainer.accelerator is Accelerator.cpu,
}


ARGS = MODEL | LAYOUT | TRAINING | PROGRESS | CHECKPOINT


def megatron_args(plan: Plan, state: RunState) -> Namespace:
    """Return what --use-checkpoint-args reads, what the loader compares, and the run's progress."""
    return Namespace(**{name: plain(row(plan, state)) for name, row in ARGS.items()})


def common_of_weights(plan: Plan) -> dict[str, Any]:
    """Return common.pt of a checkpoint that has only weights, as Megatron-LM's loader reads it."""
    return {
        "args": megatron_args(plan, RunState()),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "content_metadata": FORMAT,
    }
