"""One table: the fields of Megatron-Core's TransformerConfig that model.extra may set. No torch.

Rule: every field of every supported version is here once, unless it has a key of its own
(schema.py) or belongs to the architecture (transformer_fields.py); test_extra_fields.py names a
missing one. Rows follow the sources of both versions and experiments; rules/extra.py refuses a
field that would have no effect or fail in a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mixtrain.config.choices import Accelerator, Dispatcher, Precision, TransformerImpl
from mixtrain.config.plan import Plan
from mixtrain.config.transformer_fields import ARCHITECTURE, SECTIONS


class Need(NamedTuple):
    """A condition without which Megatron-Core does not read a field."""

    condition: str
    holds: Callable[[Plan], bool]


def _layers(plan: Plan) -> str:
    return plan.config.model.transformer_impl.name


def _chunks(plan: Plan) -> bool:
    return bool(plan.config.parallel.virtual_pipeline_model_parallel_size)


def _cpu(plan: Plan) -> bool:
    return plan.config.trainer.accelerator is Accelerator.cpu


NEEDS = {
    "engine": Need(
        "model.transformer_impl = transformer_engine",
        lambda plan: plan.config.model.transformer_impl is TransformerImpl.transformer_engine,
    ),
    "megatron": Need(
        "model.transformer_impl = transformer_engine or local",
        lambda plan: plan.config.model.transformer_impl is not TransformerImpl.torch,
    ),
    "local": Need(
        "model.transformer_impl = local",
        lambda plan: plan.config.model.transformer_impl is TransformerImpl.local,
    ),
    "mask": Need(
        "model.transformer_impl = transformer_engine, or local with trainer.accelerator = gpu",
        lambda plan: (
            _layers(plan) == "transformer_engine" or _layers(plan) == "local" and not _cpu(plan)
        ),
    ),
    "fusible": Need(
        "trainer.accelerator = gpu, or model.transformer_impl = local",
        lambda plan: _layers(plan) != "torch" or not _cpu(plan),
    ),
    "chunks": Need(
        "parallel.virtual_pipeline_model_parallel_size of 2 or more where there is a pipeline",
        lambda plan: plan.config.parallel.pipeline_model_parallel_size == 1 or _chunks(plan),
    ),
    "virtual": Need(
        "parallel.virtual_pipeline_model_parallel_size of 2 or more", lambda plan: _chunks(plan)
    ),
    "flex": Need(
        "dispatcher.moe_token_dispatcher_type = flex",
        lambda plan: plan.config.dispatcher.moe_token_dispatcher_type is Dispatcher.flex,
    ),
    "fp8": Need(
        "trainer.precision = fp8", lambda plan: plan.config.trainer.precision is Precision.fp8
    ),
    "bf16": Need(
        "trainer.precision = bf16 or fp8",
        lambda plan: plan.config.trainer.precision is not Precision.fp32,
    ),
    "offload": Need(
        "trainer.fine_grained_activation_offloading = true",
        lambda plan: plan.config.trainer.fine_grained_activation_offloading,
    ),
    "one": Need("model.moe_router_topk = 1", lambda plan: plan.config.model.moe_router_topk == 1),
}

# Needs of fields that are read: none, names of NEEDS, or another field of model.extra that must be
# set.
READ = {
    "": """
        calculate_per_token_loss rotary_interleaved no_rope_freq softmax_scale test_mode
        clone_scatter_output_in_embedding deallocate_pipeline_outputs batch_p2p_comm batch_p2p_sync
        variable_seq_lengths
    """,  # the last five matter to some layouts only; a run may change its layout
    "chunks": "overlap_p2p_comm microbatch_group_size_per_vp_stage",
    "virtual overlap_p2p_comm": "overlap_p2p_comm_warmup_flush",
    "fusible": "cross_entropy_loss_fusion",
    "engine cross_entropy_loss_fusion": "cross_entropy_fusion_impl",
    "local bf16": "attention_softmax_in_fp32",
    "megatron": "apply_query_key_layer_scaling softmax_type glu_linear_offset"
    " activation_func_clamp_value",
    "megatron one": "moe_apply_probs_on_input",
    "mask": "window_size",
    "mask window_size": "window_attn_skip_freq",
    "engine": """
        layernorm_zero_centered_gamma fused_residual_rmsnorm use_te_activation_func
        activation_func_fp8_input_store batch_invariant_mode cp_comm_type
        disable_parameter_transpose_cache flash_attention_version moe_permute_fusion
        moe_router_fusion use_transformer_engine_op_fuser use_grouped_gemm_for_shared_expert fp4
        cpu_offloading moe_paged_stash
    """,
    "engine bf16": "fp32_residual_connection",
    "engine fp4": "fp4_recipe",
    "engine cpu_offloading": """
        cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers
    """,
    "engine moe_paged_stash": """
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu
    """,
    "fp8": """
        fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
        fp8_dot_product_attention fp8_multi_head_attention fp8_output_proj tp_only_amax_red
        first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
        moe_router_padding_for_fp8 moe_router_padding_for_quantization
    """,
    "flex": """
        moe_deepep_num_sms moe_hybridep_num_sms moe_flex_dispatcher_num_sms
        moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_hybridep_num_sms_preprocessing
    """,
    "offload": """
        min_offloaded_tensor_size delta_offload_bytes_across_pp_ranks activation_offload_fraction
        fine_grained_offloading_max_inflight_offloads
    """,
}

# Fields that mixtrain always sets, by what sets them.
SET = {
    "trainer.precision": "fp16 bf16 params_dtype pipeline_dtype enable_autocast autocast_dtype fp8",
    "trainer.deterministic": "deterministic_mode",
    "the training loop, a function that no text can name": """
        timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func
        moe_grad_scale_func mtp_grad_scale_func experimental_attention_variant_loss_scale_func
        _cpu_offloading_context
    """,
    "engine/weight_init.py, which draws every weight from model.init_method_std": """
        init_method output_layer_init_method embedding_init_method embedding_init_method_std
        init_model_with_meta_device
    """,
}

# Fields that no code on our path reads, by reason.
UNREAD = {
    "no code of Megatron-Core reads it": """
        moe_extended_tp async_tensor_model_parallel_allreduce
        apply_residual_connection_post_layernorm use_grouped_gemm_for_dense_mlp
    """,
    "trainer.recompute_modules=[moe] replaces it": "moe_layer_recompute",
    "dispatcher.moe_expert_capacity_factor decides whether tokens drop": "moe_token_dropping",
    "metrics.jsonl has every layer": "moe_per_layer_logging",
    "only Megatron-LM's training loop reads it": """
        use_te_rng_tracker inference_rng_tracker pipeline_model_parallel_comm_backend
        barrier_with_L1_time disable_bf16_reduced_precision_matmul
        hierarchical_context_parallel_sizes
    """,
    "only Megatron-LM's training loop clips or logs attention logits": """
        qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit
    """,
    "nothing records or replays a routing": "moe_enable_routing_replay",
    "the layers are built without it; model.qk_layernorm is the alternative": "qk_l2_norm",
    "sequence parallelism, which experts need, splits them": "distribute_saved_activations",
    "only inference reads it": """
        flash_decode inference_sampling_seed symmetric_ar_type use_inference_optimized_layers
        inference_fuse_tp_communication mlp_chunks_for_prefill nccl_all_reduce_for_prefill
        inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        moe_pad_experts_for_cuda_graph_inference inference_cuda_graph_scope
    """,
    "it is for Mamba layers": """
        is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
        use_mamba_mem_eff_path mamba_training_ssm_states_dtype
    """,
    "positions are rotary, of one dimension": "mrope_section",
    "it is for a balancing type that router does not have": "moe_router_quantile_balancing_ema",
    "it is for a backend that dispatcher does not have": "moe_ncclep_static_shape"
    " moe_ncclep_zero_copy",
    "its activation is the squared ReLU": "use_fused_weighted_squared_relu",
    "it is for Apex's LayerNorm": "memory_efficient_layer_norm",
}

# Fields that are read but not supported, by reason.
UNSUPPORTED = {
    "the plan does not count what it changes": """
        moe_layer_freq mtp_num_layers mtp_loss_scaling_factor mtp_standalone mtp_use_repeated_layer
        mtp_detach_heads mtp_hybrid_override_pattern multi_latent_attention
        attention_output_gate moe_latent_size heterogeneous_block_specs
        hetereogenous_dist_checkpoint
    """,
    "it is for another attention": """
        experimental_attention_variant linear_attention_freq linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
        dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff
        dsa_indexer_use_sparse_loss dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
        dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
        dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
    """,
    "CUDA graphs need a random tracker and a capture that mixtrain does not make": """
        enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_scope cuda_graph_modules
        cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
        delay_offload_until_cuda_graph
    """,
    "it needs buffers that only the startup of Megatron-LM creates": """
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs
        tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
        tp_comm_bootstrap_backend
    """,
    "its schedule needs a forward step of another form": """
        overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release
        high_priority_a2a_comm_stream overlap_dispatch_backward_with_experts_wgrad
        num_microbatches_with_partial_activation_checkpoints hybrid_context_parallel
        max_seqlen_per_dp_cp_rank
    """,
    "it needs a fusion that mixtrain switches off": """
        defer_embedding_wgrad_compute wgrad_deferral_limit fused_single_qkv_rope
    """,
    "it needs a PyTorch with ring_exchange": "use_ring_exchange_p2p",
    "weights would be stored in eight or four bits": "fp8_param fp4_param",
    "it names code, or takes an object": """
        fp8_quantizer_factory fp4_quantizer_factory quant_recipe use_kitchen use_kitchen_attention
        kitchen_attention_backend
    """,
    "it changes the checkpoint format, which every layout and conversion reads": """
        moe_use_legacy_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias
        moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size
    """,
    "it scales weights and learning rates, which mixtrain draws and sets itself": """
        use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult
        mup_base_head_dim mup_attn_scale_power
    """,
    "it needs process groups that mixtrain does not create": """
        tensor_parallel_num_weight_shards gtp_weight_remat_size
        expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size
    """,
    "config.yaml and plan.txt of a run record the settings": "config_logger_dir",
    "router.moe_router_group_topk replaces it": "moe_router_topk_limited_devices",
    "dispatcher.moe_flex_dispatcher_backend replaces it": "moe_enable_deepep",
    "the plan would not say that tokens are dropped": "moe_expert_rank_capacity_factor",
    "the plan would not say that the router is forced": "moe_router_force_biased",
    "every part of a sequence would have an auxiliary loss of its own": "mlp_chunks_for_training",
}

# field -> (unsupported value, reason)
VALUES = {"softmax_type": ("learnable", "it adds parameters that the plan does not count")}
TABLES = {"read": READ, "set": SET, "unread": UNREAD, "unsupported": UNSUPPORTED}
# field -> (table, reason or needs)
CLASS_OF = {
    name: (kind, why)
    for kind, table in TABLES.items()
    for why, names in table.items()
    for name in names.split()
} | {name: ("set", "the architecture") for name in ARCHITECTURE}


def dedicated_keys(plan: Plan) -> dict[str, str]:
    """Return {field: the key that sets it}."""
    return {
        name: f"{section}.{name}"
        for section in SECTIONS
        for name in vars(getattr(plan.config, section))
    }
