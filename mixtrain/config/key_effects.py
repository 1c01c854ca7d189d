"""One table: what a key changes, the mathematics of a run or only its execution. No torch.

Rule: every key has a row. `mathematics`: the resulting model differs by more than the order of
additions. `execution`: the same model, faster, smaller or elsewhere (docs/parity.md has the proof
and the few routers for which a layout changes more). `records`: what is written, and when.
"""

from __future__ import annotations

from typing import NamedTuple

from mixtrain.config.schema import Config, legal_keys, plain

MATHEMATICS = "mathematics"
EXECUTION = "execution"
RECORDS = "records"


CLASSES = {
    MATHEMATICS: """
        seed
        model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads
        model.num_query_groups model.kv_channels model.num_moe_experts model.moe_router_topk
        model.moe_ffn_hidden_size model.moe_shared_expert_intermediate_size model.vocab_size
        model.max_position_embeddings model.rotary_base model.layernorm_epsilon
        model.init_method_std model.untie_embeddings_and_output_weights model.qk_layernorm
        model.qk_layernorm_over model.add_qkv_bias model.moe_shared_expert_gate model.extra
        parallel.acknowledged_faults
        router.moe_router_load_balancing_type router.moe_aux_loss_coeff router.moe_z_loss_coeff
        router.moe_input_jitter_eps router.moe_router_score_function router.moe_router_pre_softmax
        router.moe_router_enable_expert_bias router.moe_router_bias_update_rate
        router.moe_router_force_load_balancing router.moe_router_dtype router.moe_router_num_groups
        router.moe_router_group_topk router.moe_router_topk_scaling_factor
        dispatcher.moe_expert_capacity_factor dispatcher.moe_token_drop_policy
        optimizer.optimizer optimizer.lr optimizer.min_lr optimizer.weight_decay
        optimizer.adam_beta1 optimizer.adam_beta2 optimizer.adam_eps optimizer.clip_grad
        optimizer.grad_reduce_in_fp32 optimizer.lr_decay_style optimizer.lr_warmup_steps
        optimizer.lr_warmup_fraction optimizer.lr_decay_steps optimizer.lr_wsd_decay_style
        optimizer.lr_wsd_decay_steps
        data.kind data.data_path data.split data.seq_length data.tokenizer
        trainer.max_steps trainer.micro_batch_size trainer.global_batch_size
        trainer.rampup_batch_size trainer.precision trainer.fp8_recipe trainer.bad_step_policy
        trainer.bad_step_grad_norm trainer.bad_step_limit
        checkpoint.load_weights checkpoint.acknowledge_differences
    """,  # micro_batch_size: an auxiliary loss is the mean over microbatches
    EXECUTION: """
        model.transformer_impl model.attention_backend model.moe_grouped_gemm
        parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size
        parallel.virtual_pipeline_model_parallel_size parallel.context_parallel_size
        parallel.expert_model_parallel_size parallel.expert_tensor_parallel_size
        parallel.sequence_parallel parallel.num_distributed_optimizer_instances
        parallel.data_parallel_sharding_strategy parallel.num_layers_in_first_pipeline_stage
        parallel.num_layers_in_last_pipeline_stage parallel.account_for_embedding_in_pipeline_split
        parallel.account_for_loss_in_pipeline_split parallel.pipeline_model_parallel_layout
        dispatcher.moe_token_dispatcher_type dispatcher.moe_pad_expert_input_to_capacity
        dispatcher.moe_flex_dispatcher_backend dispatcher.moe_shared_expert_overlap
        optimizer.use_distributed_optimizer optimizer.overlap_grad_reduce
        optimizer.overlap_param_gather optimizer.bucket_size optimizer.optimizer_cpu_offload
        optimizer.optimizer_offload_fraction
        data.num_workers
        trainer.accelerator trainer.devices trainer.num_nodes trainer.recompute_granularity
        trainer.recompute_method trainer.recompute_num_layers trainer.recompute_modules
        trainer.fine_grained_activation_offloading trainer.offload_modules trainer.deterministic
        trainer.timeout_minutes trainer.device_memory_gib
    """,
    RECORDS: """
        name
        run_dir
        model.hf_model
        data.path_to_cache
        trainer.mode trainer.val_check_interval trainer.limit_val_batches trainer.log_every_n_steps
        checkpoint.save_interval checkpoint.save_last checkpoint.keep_last checkpoint.async_save
        checkpoint.verify checkpoint.resume checkpoint.max_attempts
        logging.tensorboard
        trainer.preflight
        launcher.type launcher.partition launcher.account launcher.time launcher.gpus_per_node
        launcher.container_image launcher.container_mounts launcher.env_file launcher.max_requeues
        launcher.sbatch_args
    """,
}

# loss, a jitter or a dtype belongs to a training: weights are not for one of them.)
FORWARD = """
    model.num_attention_heads model.num_query_groups model.kv_channels model.moe_router_topk
    model.rotary_base model.layernorm_epsilon model.untie_embeddings_and_output_weights
    model.qk_layernorm model.qk_layernorm_over model.add_qkv_bias model.moe_shared_expert_gate
    router.moe_router_load_balancing_type router.moe_router_score_function
    router.moe_router_pre_softmax router.moe_router_enable_expert_bias
    router.moe_router_force_load_balancing router.moe_router_num_groups router.moe_router_group_topk
    router.moe_router_topk_scaling_factor
    dispatcher.moe_expert_capacity_factor dispatcher.moe_token_drop_policy
""".split()
CLASS_OF = {key: kind for kind, keys in CLASSES.items() for key in keys.split()}


class Change(NamedTuple):
    """A key whose value differs from the recipe's."""

    key: str
    recipe: object
    value: object

    def __str__(self) -> str:
        return f"{self.key} = {show(self.value)} (recipe: {show(self.recipe)})"


def changes(recipe: Config, config: Config) -> dict[str, list[Change]]:
    """Return the differences from the recipe by class, without records."""
    by_class: dict[str, list[Change]] = {MATHEMATICS: [], EXECUTION: []}
    for key in legal_keys():
        before = value_of(recipe, key)
        after = value_of(config, key)
        if before != after and CLASS_OF[key] in by_class:
            by_class[CLASS_OF[key]].append(Change(key, before, after))
    return by_class


def value_of(config: Config, key: str) -> object:
    """Return the plain value of a dotted key."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return plain(value)


def show(value: object) -> str:
    """Return a value as a user would type it."""
    if isinstance(value, list):
        return f"[{','.join(show(item) for item in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
