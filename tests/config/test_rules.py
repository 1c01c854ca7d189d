"""Every cross-field rule refuses what it is there for, with the key, both numbers and a value that
is legal.
"""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from composing import RECIPES, config_of, derived, plan_of, problems_in, problems_of, quick_tree_of

from mixtrain.config.key_effects import show, value_of
from mixtrain.config.plan import Plan
from mixtrain.config.rules import RULES, broken_rules, upstream
from mixtrain.config.rules.upstream import megatron_version
from mixtrain.config.schema import legal_keys

RECIPE = "+recipe=mixtral_8x7b_ep8"
INDEXED = "data=indexed data.seq_length=128 data.data_path=[corpus] data.tokenizer=tokens"
TE = "model.transformer_impl=transformer_engine"
LOCAL = "model.transformer_impl=local model.moe_grouped_gemm=false"
SHARED = "model.moe_shared_expert_intermediate_size=256"
ALL_KEPT = (
    "trainer.recompute_granularity=null trainer.recompute_method=null"
    " trainer.recompute_num_layers=null"
)
ALL_AGAIN = (
    "trainer.recompute_granularity=full and trainer.recompute_method=uniform and"
    " trainer.recompute_num_layers=1"
)
TRY = "trainer.device_memory_gib=null to try anyway"
INTERLEAVED = (
    "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2"
)
OFFLOAD = f"{TE} trainer.accelerator=gpu trainer.fine_grained_activation_offloading=true"

# rule, overrides on top of the default configuration, what one line of the refusal must contain

CASES = [
    (
        "time_is_valid",
        "launcher.time=tomorrow",
        ["launcher.time = tomorrow is not a Slurm time"],
    ),
    (
        "time_leaves_room_to_train",
        "launcher.time=5",
        [
            "launcher.time = 5 is 300 s",
            "asked to stop 300 s before the limit",
            "at least 6 (minutes)",
        ],
    ),
    (
        "gpus_cover_the_ranks",
        "trainer.accelerator=gpu launcher.gpus_per_node=1",
        ["launcher.gpus_per_node = 1 must be at least trainer.devices = 2"],
    ),
    (
        "sbatch_flags_are_free",
        "launcher.sbatch_args.N=2",
        ["launcher.sbatch_args.N must be the long name of a flag"],
    ),
    (
        "sbatch_flags_are_free",
        "launcher.sbatch_args.ntasks_per_node=2",
        ["launcher.sbatch_args.ntasks_per_node has a key of its own; set trainer.devices"],
    ),
    (
        "sbatch_flags_are_free",
        "launcher.sbatch_args.wrap=date",
        ["launcher.sbatch_args.wrap would change what the job or sbatch does"],
    ),
    (
        "sbatch_flags_are_free",
        "launcher.sbatch_args.comment='a\"b'",
        ["launcher.sbatch_args.comment has", "double quote"],
    ),
    (
        "sbatch_flags_are_free",
        "launcher.sbatch_args.mem=1.5",
        ["launcher.sbatch_args.mem = 1.5", "sbatch reads a text", "quote it"],
    ),
    (
        "texts_are_not_empty",
        "run_dir=",
        ["run_dir is empty", "an unset shell variable", "give a text"],
    ),
    (
        "texts_are_not_empty",
        "data.data_path=['',a]",
        ["data.data_path is empty", "give a text or null"],
    ),
    (
        "paths_are_unambiguous",
        "data.tokenizer='~/tokens'",
        ["data.tokenizer = ~/tokens", "nothing expands ~", "$HOME/tokens"],
    ),
    (
        "paths_are_unambiguous",
        "data.path_to_cache=//",
        ["data.path_to_cache = // is the root of the file system", "a directory of its own"],
    ),
    ("slurm_names_are_plain", "launcher.account='a\"b'", ['launcher.account = a"b must be a name']),
    (
        "mounts_need_an_image",
        "launcher.container_mounts=[/data]",
        ["launcher.container_mounts = [/data], but launcher.container_image = null"],
    ),
    (
        "world_size_fits_dense_grid",
        "parallel.tensor_model_parallel_size=4 trainer.devices=6",
        ["trainer.devices * trainer.num_nodes = 6*1 = 6", "TP*PP*CP = 4", "use 4 or 8 ranks"],
    ),
    (
        "world_size_fits_expert_grid",
        "parallel=ep1 parallel.expert_model_parallel_size=4 trainer.devices=3 trainer.num_nodes=2",
        ["trainer.devices * trainer.num_nodes = 3*2 = 6", "ETP*EP*PP = 4", "use 4 or 8 ranks"],
    ),
    (
        "expert_parallel_divides_experts",
        "parallel.expert_model_parallel_size=5",
        [
            "parallel.expert_model_parallel_size = 5 must divide model.num_moe_experts = 8",
            "use 4 or 8",
        ],
    ),
    (
        "expert_parallel_divides_experts",
        "parallel.expert_model_parallel_size=16",
        ["parallel.expert_model_parallel_size = 16 must divide model.num_moe_experts = 8", "use 8"],
    ),
    (
        "topk_within_experts",
        "model.moe_router_topk=9",
        ["model.moe_router_topk = 9 must be at most model.num_moe_experts = 8"],
    ),
    (
        "heads_over_tensor_ranks",
        "parallel.tensor_model_parallel_size=4",
        [
            "parallel.tensor_model_parallel_size = 4 must divide model.num_attention_heads = 6",
            "use 2",
        ],
    ),
    (
        "heads_over_tensor_ranks",
        "parallel.tensor_model_parallel_size=3",
        ["parallel.tensor_model_parallel_size = 3 must divide model.num_query_groups = 2", "use 2"],
    ),
    (
        "heads_over_tensor_ranks",
        "parallel.tensor_model_parallel_size=2 model.num_query_groups=3",
        [
            "parallel.tensor_model_parallel_size = 2 must divide model.num_query_groups = 3",
            "use 1 or 3",
        ],
    ),
    (
        "query_groups_divide_heads",
        "model.num_query_groups=4",
        ["model.num_query_groups = 4 must divide model.num_attention_heads = 6", "use 3 or 6"],
    ),
    (
        "vocabulary_over_tensor_ranks",
        "model.vocab_size=4097 parallel.tensor_model_parallel_size=2",
        [
            "model.vocab_size = 4097",
            "parallel.tensor_model_parallel_size = 2",
            "never padded",
            "use 4096 or 4098",
        ],
    ),
    (
        "layers_over_stages",
        "parallel.pipeline_model_parallel_size=3",
        ["model.num_layers = 4 must be a multiple of PP*VPP = 3*1", "use 3 or 6"],
    ),
    (
        "layers_over_stages",
        "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=3",
        ["model.num_layers = 4 must be a multiple of PP*VPP = 2*3", "use 6"],
    ),
    (
        "sequence_over_ranks",
        "data.seq_length=127 parallel.tensor_model_parallel_size=2",
        ["data.seq_length = 127 must be a multiple of TP = 2", "use 126 or 128"],
    ),
    (
        "sequence_over_ranks",
        "parallel.context_parallel_size=3",
        ["data.seq_length = 128 must be a multiple of 2*CP*TP = 6", "use 126 or 132"],
    ),
    (
        "sequence_over_ranks",
        "data.seq_length=132 parallel.context_parallel_size=2"
        " parallel.tensor_model_parallel_size=2",
        ["data.seq_length = 132 must be a multiple of 2*CP*TP = 8", "use 128 or 136"],
    ),
    (
        "sequence_within_positions",
        "data.seq_length=4096",
        ["data.seq_length = 4096 must be at most model.max_position_embeddings = 2048"],
    ),
    (
        "expert_ffn_over_tensor_ranks",
        "parallel.expert_tensor_parallel_size=3",
        [
            "parallel.expert_tensor_parallel_size = 3 must divide model.moe_ffn_hidden_size = 512",
            "use 2 or 4",
        ],
    ),
    (
        "expert_ffn_over_tensor_ranks",
        "parallel.tensor_model_parallel_size=3 model.moe_shared_expert_intermediate_size=256",
        [
            "parallel.tensor_model_parallel_size = 3 must divide"
            " model.moe_shared_expert_intermediate_size = 256",
            "use 2 or 4",
        ],
    ),
    (
        "batch_over_ranks",
        "trainer.global_batch_size=18",
        [
            "trainer.global_batch_size = 18",
            "trainer.micro_batch_size * data parallel size = 4*2 = 8",
            "use 16 or 24",
        ],
    ),
    (
        "balancing_has_its_coefficient",
        "router=sinkhorn router.moe_aux_loss_coeff=0.02",
        [
            "moe_router_load_balancing_type = sinkhorn",
            "router.moe_aux_loss_coeff = 0.02",
            "use router.moe_aux_loss_coeff=0",
        ],
    ),
    (
        "balancing_has_its_coefficient",
        f"{RECIPE} router=none",
        [
            "moe_router_load_balancing_type = none",
            "router.moe_aux_loss_coeff = 0.01",
            "use router.moe_aux_loss_coeff=0",
        ],
    ),
    (
        "sinkhorn_drops_nothing",
        "router=sinkhorn dispatcher.moe_expert_capacity_factor=1.25",
        [
            "moe_router_load_balancing_type = sinkhorn",
            "dispatcher.moe_expert_capacity_factor = 1.25",
            "use dispatcher.moe_expert_capacity_factor=null",
        ],
    ),
    (
        "balanced_sees_whole_microbatches",
        "router=balanced parallel=ep1 parallel.tensor_model_parallel_size=2"
        " parallel.sequence_parallel=true",
        [
            "parallel.tensor_model_parallel_size = 2 cannot go with"
            " router.moe_router_load_balancing_type = balanced",
            "sequence parallelism",
            "use parallel.tensor_model_parallel_size=1",
        ],
    ),
    (
        "balanced_sees_whole_microbatches",
        "router=balanced parallel.context_parallel_size=2 trainer.devices=4",
        [
            "parallel.context_parallel_size = 2 cannot go with"
            " router.moe_router_load_balancing_type = balanced",
            "a part of each sequence",
            "use parallel.context_parallel_size=1",
        ],
    ),
    (
        "balanced_sees_whole_microbatches",
        "router=balanced dispatcher.moe_expert_capacity_factor=1.25",
        [
            "dispatcher.moe_expert_capacity_factor = 1.25 cannot go with"
            " router.moe_router_load_balancing_type = balanced",
            "no expert gets more than its share",
            "use dispatcher.moe_expert_capacity_factor=null",
        ],
    ),
    (
        "balanced_sees_whole_microbatches",
        "router=balanced router.moe_router_force_load_balancing=true",
        [
            "router.moe_router_force_load_balancing = true cannot go with"
            " router.moe_router_load_balancing_type = balanced",
            "random scores",
            "use router.moe_router_force_load_balancing=false",
        ],
    ),
    (
        "balanced_sees_whole_microbatches",
        "router=balanced model.transformer_impl=local model.moe_grouped_gemm=false",
        [
            "model.transformer_impl = local cannot go with"
            " router.moe_router_load_balancing_type = balanced",
            "balanced router",
            "use model.transformer_impl=torch",
        ],
    ),
    (
        "balanced_sees_whole_microbatches",
        "router=balanced model.extra.moe_router_fusion=true",
        [
            "model.extra.moe_router_fusion = true cannot go with"
            " router.moe_router_load_balancing_type = balanced",
            "fused",
            "use model.extra.moe_router_fusion=false",
        ],
    ),
    (
        "balancing_has_its_coefficient",
        "router=balanced router.moe_aux_loss_coeff=0.01",
        [
            "moe_router_load_balancing_type = balanced has no auxiliary loss",
            "use router.moe_aux_loss_coeff=0",
        ],
    ),
    (
        "balancing_types_can_be_combined",
        "router.moe_router_load_balancing_type=[aux_loss,balanced]"
        " router.moe_aux_loss_coeff=[0.1,0]",
        ["router.moe_router_load_balancing_type: balanced cannot be combined", "balanced alone"],
    ),
    (
        "one_expert_needs_pre_softmax",
        "router=balanced model.moe_router_topk=1",
        ["model.moe_router_topk = 1", "router.moe_router_pre_softmax=true"],
    ),
    (
        "keys_are_read",
        "router=balanced router.moe_router_enable_expert_bias=true",
        [
            "router.moe_router_enable_expert_bias = true is not read with"
            " router.moe_router_load_balancing_type = balanced",
            "use false",
        ],
    ),
    (
        "expert_bias_needs_sigmoid",
        "router.moe_router_enable_expert_bias=true",
        [
            "router.moe_router_enable_expert_bias = true",
            "router.moe_router_score_function = sigmoid",
            "not softmax",
        ],
    ),
    (
        "padding_needs_capacity",
        "dispatcher.moe_pad_expert_input_to_capacity=true",
        [
            "dispatcher.moe_pad_expert_input_to_capacity = true",
            "dispatcher.moe_expert_capacity_factor",
            "null",
        ],
    ),
    (
        "tensor_parallel_experts_need_sequence_parallel",
        "parallel.tensor_model_parallel_size=2",
        ["parallel.tensor_model_parallel_size = 2", "parallel.sequence_parallel = true"],
    ),
    (
        "sequence_parallel_needs_tensor_parallel",
        "parallel.sequence_parallel=true",
        [
            "parallel.sequence_parallel = true",
            "parallel.tensor_model_parallel_size = 1",
            "use false",
        ],
    ),
    (
        "overlap_requirements_hold",
        "optimizer.overlap_param_gather=true optimizer.use_distributed_optimizer=false",
        [
            "optimizer.overlap_param_gather = true",
            "optimizer.use_distributed_optimizer = true",
            "it is false",
        ],
    ),
    (
        "overlap_requirements_hold",
        "optimizer.overlap_param_gather=true",
        [
            "optimizer.overlap_param_gather = true",
            "optimizer.overlap_grad_reduce = true",
            "it is false",
        ],
    ),
    (
        "local_layers_support_layout",
        f"{LOCAL} parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true",
        [
            "parallel.tensor_model_parallel_size = 2",
            "norm of model.transformer_impl = local",
            "1, or model.",
        ],
    ),
    (
        "local_layers_support_layout",
        f"{LOCAL} parallel.context_parallel_size=2",
        [
            "parallel.context_parallel_size = 2",
            "attention of model.transformer_impl = local",
            "1, or model.",
        ],
    ),
    (
        "local_layers_support_layout",
        f"{LOCAL} parallel.expert_tensor_parallel_size=2",
        [
            "parallel.expert_tensor_parallel_size = 2",
            "experts of model.transformer_impl = local",
            "1, or model.",
        ],
    ),
    (
        "local_layers_support_layout",
        "model.transformer_impl=local",
        [
            "model.moe_grouped_gemm = true",
            "model.transformer_impl = torch or transformer_engine, not local",
        ],
    ),
    (
        "grouped_gemm_rows_are_aligned",
        "model.hidden_size=190",
        ["model.hidden_size = 190 must be a multiple of 4 (16 bytes of fp32)", "use 188 or 192"],
    ),
    (
        "grouped_gemm_rows_are_aligned",
        "trainer.precision=bf16 parallel.expert_tensor_parallel_size=2 parallel=ep1"
        " model.moe_ffn_hidden_size=504",
        [
            "model.moe_ffn_hidden_size / ETP = 504/2 = 252 must be a multiple of 8 (16 bytes of"
            " bf16)",
            "use 496 or 512",
        ],
    ),
    (
        "attention_backend_is_supported",
        "model.attention_backend=fused",
        ["model.attention_backend = fused", "trainer.accelerator = gpu", "use auto"],
    ),
    (
        "attention_backend_is_supported",
        f"{LOCAL} model.attention_backend=flash",
        [
            "model.attention_backend = flash",
            "model.transformer_impl = local",
            "model.transformer_impl=torch",
        ],
    ),
    (
        "attention_backend_is_supported",
        "model.attention_backend=flash trainer.accelerator=gpu trainer.precision=fp32",
        ["model.attention_backend = flash", "not trainer.precision = fp32", "use auto"],
    ),
    (
        "acknowledged_differences_are_keys",
        "checkpoint.acknowledge_differences=[model.rotary_bass]",
        [
            "checkpoint.acknowledge_differences has model.rotary_bass",
            "did you mean model.rotary_base?",
        ],
    ),
    (
        "acknowledged_differences_are_keys",
        "checkpoint.acknowledge_differences=[seed]",
        [
            "checkpoint.acknowledge_differences has seed",
            "the keys are model.extra.FIELD, model.num_attention_heads",
        ],
    ),
    (
        "upstream_faults_are_acknowledged",
        "parallel.acknowledged_faults=[expert_gradient_over_tp]",
        ["expert_gradient_over_tp", "did you mean expert_gradients_over_tp?"],
    ),
    (
        "upstream_faults_are_acknowledged",
        "parallel.acknowledged_faults=[all]",
        [
            "parallel.acknowledged_faults has all",
            "the names are expert_gradients_over_tp, per_token_auxiliary_loss",
        ],
    ),
    (
        "virtual_pipeline_needs_pipeline",
        "parallel.virtual_pipeline_model_parallel_size=2",
        [
            "parallel.virtual_pipeline_model_parallel_size = 2",
            "parallel.pipeline_model_parallel_size",
            "not 1",
            "use null",
        ],
    ),
    (
        "virtual_pipeline_needs_pipeline",
        "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2"
        " trainer.global_batch_size=24",
        [
            "3 microbatches a step",
            "parallel.pipeline_model_parallel_size = 2",
            "use trainer.global_batch_size = 16 or 32",
        ],
    ),
    (
        "virtual_pipeline_needs_pipeline",
        f"{INTERLEAVED} trainer.micro_batch_size=1 trainer.global_batch_size=6",
        ["3 microbatches a step", "use trainer.global_batch_size = 4 or 8"],
    ),
    (
        "optimizer_instances_divide",
        "parallel=ep1 trainer.devices=2 parallel.num_distributed_optimizer_instances=2"
        " optimizer.use_distributed_optimizer=false",
        [
            "parallel.num_distributed_optimizer_instances = 2",
            "optimizer.use_distributed_optimizer = true",
        ],
    ),
    (
        "optimizer_instances_divide",
        "trainer.devices=4 parallel.num_distributed_optimizer_instances=4",
        [
            "parallel.num_distributed_optimizer_instances = 4 must divide expert data parallel"
            " size = 2",
            "use 2",
        ],
    ),
    (
        "optimizer_instances_divide",
        "trainer.devices=6 parallel.num_distributed_optimizer_instances=4",
        [
            "parallel.num_distributed_optimizer_instances = 4 must divide data parallel size * CP"
            " = 6",
            "use 3",
        ],
    ),
    (
        "full_recompute_is_complete",
        "trainer.recompute_granularity=full",
        ["trainer.recompute_granularity = full needs trainer.recompute_method"],
    ),
    (
        "full_recompute_is_complete",
        "trainer.recompute_granularity=full",
        ["trainer.recompute_granularity = full needs trainer.recompute_num_layers"],
    ),
    (
        "full_recompute_is_complete",
        "trainer.recompute_method=block",
        ["trainer.recompute_method is set", "trainer.recompute_granularity = full", "use null"],
    ),
    (
        "full_recompute_is_complete",
        "trainer.recompute_num_layers=1",
        ["trainer.recompute_num_layers is set", "trainer.recompute_granularity = full", "use null"],
    ),
    (
        "full_recompute_fits_every_chunk",
        "trainer.recompute_granularity=full trainer.recompute_method=uniform"
        " trainer.recompute_num_layers=3",
        ["trainer.recompute_num_layers = 3 does not fit the 4 layers", "use 2 or 4"],
    ),
    (
        "full_recompute_fits_every_chunk",
        "trainer.recompute_granularity=full trainer.recompute_method=block"
        " trainer.recompute_num_layers=5",
        ["trainer.recompute_num_layers = 5 does not fit the 4 layers", "use 4"],
    ),
    (
        "selective_recompute_names_modules",
        "trainer.recompute_granularity=selective",
        [
            "trainer.recompute_modules = null",
            "trainer.recompute_granularity = selective",
            "core_attn",
        ],
    ),
    (
        "selective_recompute_names_modules",
        "trainer.recompute_modules=[moe]",
        [
            "trainer.recompute_modules = ['moe']",
            "trainer.recompute_granularity = null: selective needs a list",
        ],
    ),
    (
        "selective_recompute_names_modules",
        "trainer.recompute_granularity=selective trainer.recompute_modules=[moe,mo_act]",
        ["trainer.recompute_modules has mo_act", "core_attn", "moe_act"],
    ),
    (
        "selective_recompute_names_modules",
        "model.moe_grouped_gemm=false trainer.recompute_granularity=selective"
        " trainer.recompute_modules=[moe_act]",
        ["trainer.recompute_modules has moe_act", "model.moe_grouped_gemm = true"],
    ),
    (
        "fp8_needs_transformer_engine",
        "trainer.precision=fp8 trainer.accelerator=gpu",
        ["trainer.precision = fp8", "model.transformer_impl = transformer_engine", "not torch"],
    ),
    (
        "fp8_needs_transformer_engine",
        f"trainer.precision=fp8 {TE}",
        ["trainer.precision = fp8", "trainer.accelerator = gpu", "not cpu"],
    ),
    (
        "data_source_is_given",
        f"{INDEXED} data.data_path=[]",
        ["data.kind = indexed", "data.data_path=[PREFIX]", "empty"],
    ),
    (
        "data_source_is_given",
        f"{INDEXED} data.tokenizer=null",
        ["data.kind = indexed", "data.tokenizer=DIRECTORY", "null"],
    ),
    (
        "data_source_is_given",
        "data.data_path=[corpus]",
        ["data.data_path", "data.kind = stdlib", "data=indexed"],
    ),
    (
        "data_is_named_once",
        f"{INDEXED} data.data_path=[a/corpus,b,./a//corpus]",
        ["data.data_path has a/corpus and ./a//corpus, which are the same data", "leave one out"],
    ),
    (
        "data_is_named_once",
        f"{INDEXED} data.data_path=[2,corpus,a]",
        ["data.data_path = ['2', 'corpus', 'a'] does not alternate weights and prefixes"],
    ),
    (
        "split_has_three_parts",
        "data.split='90,10'",
        ['data.split = "90,10"', "three numbers", "90,5,5"],
    ),
    (
        "split_has_three_parts",
        "data.split='0,50,50'",
        ['data.split = "0,50,50"', "the first above 0"],
    ),
    (
        "split_has_three_parts",
        "data.split='90,nan,5'",
        ['data.split = "90,nan,5"', "three numbers"],
    ),
    (
        "split_has_three_parts",
        "data.split='90,1e999,5'",
        ['data.split = "90,1e999,5"', "three numbers"],
    ),
    (
        "split_has_three_parts",
        "data.split='90,ten,5'",
        ['data.split = "90,ten,5"', "three numbers"],
    ),
    (
        "split_has_three_parts",
        "data.split='90,0,10'",
        ['data.split = "90,0,10"', "trainer.limit_val_batches=0"],
    ),
    (
        "warmup_ends_before_decay",
        "optimizer.lr_warmup_steps=300 optimizer.lr_decay_steps=300",
        ["optimizer.lr_warmup_steps = 300", "below optimizer.lr_decay_steps = 300"],
    ),
    (
        "warmup_ends_before_decay",
        "optimizer.min_lr=1",
        ["optimizer.min_lr = 1", "at most optimizer.lr = 0.002"],
    ),
    (
        "cpu_run_fits_a_laptop",
        "trainer.devices=16 trainer.global_batch_size=64",
        ["takes 16 ranks", "at most 8", "trainer.devices=2"],
    ),
    (
        "cpu_run_fits_a_laptop",
        "parallel=ep8 parallel.pipeline_model_parallel_size=2 trainer.global_batch_size=32",
        ["takes 16 ranks", "at most 8", "parallel.expert_model_parallel_size=4 trainer.devices=8"],
    ),
    (
        "state_fits_the_device",
        f"{RECIPE} trainer.num_nodes=1 optimizer.grad_reduce_in_fp32=true",
        ["105.7 GiB", "trainer.device_memory_gib = 79"],
    ),
    (
        "activations_fit_the_device",
        f"{RECIPE} {ALL_KEPT} data.seq_length=32768 trainer.micro_batch_size=8",
        [
            "stage 0 holds 59.6 GiB of weights",
            "at least 1903.6 GiB of activations (forward passes in flight: 1)",
            "trainer.device_memory_gib = 79",
            f"use {ALL_AGAIN} and trainer.micro_batch_size=1, or more TP or CP, or {TRY}",
        ],
    ),
    (
        "activations_fit_the_device",
        f"{RECIPE} {ALL_KEPT} trainer.micro_batch_size=4",
        ["at least 119.0 GiB of activations", f"use {ALL_AGAIN}, or more TP or CP, or {TRY}"],
    ),
    (
        "activations_fit_the_device",
        "+recipe=qwen3_30b_a3b trainer.micro_batch_size=32",
        [
            "at least 61.1 GiB of activations",
            f"use trainer.micro_batch_size=16, or more TP or CP, or {TRY}",
        ],
    ),
    (
        "activations_fit_the_device",
        "+recipe=mixtral_8x7b_tp1_pp4_ep8 trainer.micro_batch_size=4",
        [
            "stage 0 holds 18.7 GiB",
            "(forward passes in flight: 32)",
            f"use {ALL_AGAIN}, or trainer.micro_batch_size=1, or more TP or CP, or {TRY}",
        ],
    ),
    (
        "head_size_is_even",
        "model.kv_channels=33",
        ["model.kv_channels = 33 must be even", "use 32 or 34"],
    ),
    (
        "extra_fields_are_fields",
        "model.extra.moe_permut_fusion=true",
        [
            "model.extra.moe_permut_fusion is not a field",
            "did you mean model.extra.moe_permute_fusion?",
        ],
    ),
    (
        "extra_fields_do_something",
        "model.extra.moe_layer_freq=2",
        ["model.extra.moe_layer_freq", "the plan does not count what it changes", "use 1"],
    ),
    (
        "extra_fields_do_something",
        "model.extra.add_bias_linear=true",
        ["model.extra.add_bias_linear", "mixtrain sets this field itself, to false"],
    ),
    (
        "extra_fields_do_something",
        "model.extra.moe_extended_tp=true"
        if megatron_version() < (0, 19)
        else "model.extra.moe_token_dropping=true",
        ["= true changes nothing: ", "use false"],
    ),
    (
        "extra_fields_do_something",
        f"{LOCAL} model.extra.softmax_type=learnable",
        ["model.extra.softmax_type = learnable", "adds parameters", "use vanilla"],
    ),
    (
        "extra_fields_do_something",
        "model.extra.window_size=[128,0]",
        [
            "model.extra.window_size = [128,0] is read only with model.transformer_impl ="
            " transformer_engine",
            "use null",
        ],
    ),
    (
        "microbatch_groups_fit",
        f"{INTERLEAVED} trainer.global_batch_size=32"
        " model.extra.microbatch_group_size_per_vp_stage=1",
        [
            "model.extra.microbatch_group_size_per_vp_stage = 1 must be from PP = 2 to the 4"
            " microbatches",
            "leave it out",
        ],
    ),
    (
        "one_expert_needs_pre_softmax",
        "model.moe_router_topk=1",
        ["model.moe_router_topk = 1", "router.moe_router_pre_softmax=true", "2 or more experts"],
    ),
    (
        "balancing_types_can_be_combined",
        "router.moe_router_load_balancing_type=[] router.moe_aux_loss_coeff=[]",
        ["router.moe_router_load_balancing_type is empty", "use none"],
    ),
    (
        "balancing_types_can_be_combined",
        "router.moe_router_load_balancing_type=[aux_loss,seq_aux_loss]"
        " router.moe_aux_loss_coeff=[0.1,0.1,0.1]",
        [
            "router.moe_router_load_balancing_type has 2 types",
            "router.moe_aux_loss_coeff 3 numbers",
            "one for each",
        ],
    ),
    (
        "balancing_types_can_be_combined",
        "router.moe_router_load_balancing_type=[aux_loss,none] router.moe_aux_loss_coeff=[0.1,0]",
        ["router.moe_router_load_balancing_type: none cannot be combined", "none alone"],
    ),
    (
        "balancing_types_can_be_combined",
        "router.moe_router_load_balancing_type=[aux_loss,aux_loss]"
        " router.moe_aux_loss_coeff=[0.1,0.1]",
        ["router.moe_router_load_balancing_type names a type twice: aux_loss, aux_loss"],
    ),
    (
        "keys_are_read",
        "router=sinkhorn router.moe_router_score_function=sigmoid",
        [
            "router.moe_router_score_function = sigmoid is not read with"
            " router.moe_router_load_balancing_type = sinkhorn",
            "use softmax",
        ],
    ),
    (
        "expert_groups_fit",
        "router.moe_router_num_groups=2",
        ["router.moe_router_num_groups = 2", "router.moe_router_group_topk", "null"],
    ),
    (
        "expert_groups_fit",
        "router.moe_router_group_topk=2",
        ["router.moe_router_group_topk = 2", "router.moe_router_num_groups", "null"],
    ),
    (
        "expert_groups_fit",
        "router.moe_router_num_groups=3 router.moe_router_group_topk=2",
        ["router.moe_router_num_groups = 3 must divide model.num_moe_experts = 8", "use 2 or 4"],
    ),
    (
        "expert_groups_fit",
        "router.moe_router_num_groups=2 router.moe_router_group_topk=4",
        ["router.moe_router_group_topk = 4 must be at most router.moe_router_num_groups = 2"],
    ),
    (
        "expert_groups_fit",
        "router.moe_router_num_groups=4 router.moe_router_group_topk=2 model.moe_router_topk=3",
        ["router.moe_router_group_topk = 2 must divide model.moe_router_topk = 3", "use 1 or 3"],
    ),
    (
        "expert_groups_fit",
        "router.moe_router_num_groups=8 router.moe_router_group_topk=1",
        [
            "model.moe_router_topk = 2",
            "router.moe_router_group_topk = 1 groups have only 1 experts",
        ],
    ),
    (
        "flex_requirements_hold",
        "dispatcher=flex",
        [
            "dispatcher.moe_token_dispatcher_type = flex",
            "trainer.accelerator = cpu",
            "use dispatcher=alltoall",
        ],
    ),
    (
        "flex_requirements_hold",
        "dispatcher=flex parallel=ep1",
        [
            "dispatcher.moe_token_dispatcher_type = flex",
            "ETP*EP of 2 or more, not 1",
            "use dispatcher=alltoall",
        ],
    ),
    (
        "flex_requirements_hold",
        "dispatcher=flex dispatcher.moe_pad_expert_input_to_capacity=true"
        " dispatcher.moe_expert_capacity_factor=1",
        [
            "dispatcher.moe_pad_expert_input_to_capacity = true",
            "deepep",
            "use dispatcher.moe_flex_dispatcher_backend=hybridep, or false",
        ],
    ),
    (
        "shared_expert_gate_has_one",
        "model.moe_shared_expert_gate=true",
        ["needs a model.moe_shared_expert_intermediate_size"],
    ),
    (
        "qk_layernorm_over_projection",
        "model.qk_layernorm_over=projection",
        ["is not read with model.qk_layernorm = false", "use model.qk_layernorm_over=head"],
    ),
    (
        "qk_layernorm_over_projection",
        f"model.qk_layernorm=true model.qk_layernorm_over=projection {LOCAL}",
        ["needs model.transformer_impl = torch, not local"],
    ),
    (
        "shared_expert_overlap_requirements_hold",
        "dispatcher.moe_shared_expert_overlap=true",
        [
            "dispatcher.moe_shared_expert_overlap = true",
            "model.moe_shared_expert_intermediate_size",
            "null",
        ],
    ),
    (
        "shared_expert_overlap_requirements_hold",
        f"{SHARED} dispatcher=allgather dispatcher.moe_shared_expert_overlap=true",
        ["dispatcher.moe_shared_expert_overlap = true", "dispatcher=alltoall", "not allgather"],
    ),
    (
        "shared_expert_overlap_requirements_hold",
        f"{SHARED} dispatcher.moe_shared_expert_overlap=true"
        " trainer.recompute_granularity=selective trainer.recompute_modules=[shared_experts]",
        [
            "dispatcher.moe_shared_expert_overlap = true",
            "shared_experts in trainer.recompute_modules",
        ],
    ),
    (
        "distributed_optimizer_is_adam",
        "optimizer.optimizer=sgd",
        ["optimizer.optimizer = sgd", "optimizer.use_distributed_optimizer = false"],
    ),
    (
        "offload_needs_transformer_engine",
        "trainer.fine_grained_activation_offloading=true",
        [
            "trainer.offload_modules = null",
            "trainer.fine_grained_activation_offloading = true",
            "core_attn",
        ],
    ),
    (
        "offload_needs_transformer_engine",
        f"{OFFLOAD} trainer.offload_modules=[core_atn]",
        ["trainer.offload_modules has core_atn", "core_attn"],
    ),
    (
        "offload_needs_transformer_engine",
        f"{OFFLOAD} trainer.offload_modules=[attn_proj]",
        ["trainer.offload_modules has attn_proj", "core_attn", "give both"],
    ),
    (
        "offload_needs_transformer_engine",
        "trainer.fine_grained_activation_offloading=true trainer.offload_modules=[core_attn]",
        [
            "trainer.fine_grained_activation_offloading = true",
            "model.transformer_impl = transformer_engine",
            "not torch",
        ],
    ),
    (
        "offload_needs_transformer_engine",
        f"{OFFLOAD} trainer.offload_modules=[core_attn] trainer.recompute_granularity=full",
        ["trainer.fine_grained_activation_offloading = true", "full recompute", "use false"],
    ),
    (
        "offload_needs_transformer_engine",
        f"{TE} trainer.fine_grained_activation_offloading=true trainer.offload_modules=[core_attn]",
        [
            "trainer.fine_grained_activation_offloading = true",
            "trainer.accelerator = cpu",
            "use false",
        ],
    ),
    (
        "offload_needs_transformer_engine",
        "optimizer.optimizer_cpu_offload=true optimizer.optimizer_offload_fraction=0.5",
        ["optimizer.optimizer_cpu_offload = true", "trainer.accelerator = cpu", "use false"],
    ),
    (
        "optimizer_offload_is_consistent",
        "optimizer.optimizer_cpu_offload=true optimizer.optimizer_offload_fraction=1.5",
        ["optimizer.optimizer_offload_fraction = 1.5", "at most 1"],
    ),
    (
        "optimizer_offload_is_consistent",
        "optimizer.optimizer_cpu_offload=true",
        [
            "optimizer.optimizer_cpu_offload = true",
            "optimizer.optimizer_offload_fraction = 0.0",
            "both or neither",
        ],
    ),
    (
        "optimizer_offload_is_consistent",
        "optimizer.optimizer_cpu_offload=true optimizer.optimizer_offload_fraction=1"
        " optimizer.use_distributed_optimizer=false",
        [
            "optimizer.optimizer_cpu_offload = true",
            "optimizer.use_distributed_optimizer = true",
            "false",
        ],
    ),
    (
        "fsdp_requirements_hold",
        "parallel=fsdp",
        [
            "parallel.data_parallel_sharding_strategy = optim_grads_params",
            "trainer.accelerator = cpu",
            "use null",
        ],
    ),
    (
        "fsdp_requirements_hold",
        "parallel=fsdp optimizer.use_distributed_optimizer=false",
        [
            "data_parallel_sharding_strategy = optim_grads_params",
            "optimizer.use_distributed_optimizer = true",
        ],
    ),
    (
        "fsdp_requirements_hold",
        "parallel=fsdp parallel.pipeline_model_parallel_size=2",
        [
            "data_parallel_sharding_strategy = optim_grads_params",
            "parallel.pipeline_model_parallel_size = 1, not 2",
        ],
    ),
    (
        "fsdp_requirements_hold",
        "parallel=fsdp parallel.data_parallel_sharding_strategy=optim"
        " parallel.num_distributed_optimizer_instances=2",
        [
            "parallel.data_parallel_sharding_strategy = optim:",
            "optim_grads_params",
            "one optimizer instance",
        ],
    ),
    (
        "fsdp_saves_nothing_yet",
        "parallel=fsdp trainer.accelerator=gpu",
        [
            "parallel.data_parallel_sharding_strategy = optim_grads_params",
            "does not write or read",
            "checkpoint=none",
        ],
    ),
    (
        "rampup_reaches_the_batch",
        "trainer.rampup_batch_size=[8,8]",
        ["trainer.rampup_batch_size = [8, 8]", "[first batch, increment, samples]"],
    ),
    (
        "rampup_reaches_the_batch",
        "trainer.rampup_batch_size=[8,0,100]",
        ["trainer.rampup_batch_size = [8, 0, 100]", "1 or more"],
    ),
    (
        "rampup_reaches_the_batch",
        "trainer.rampup_batch_size=[16,8,100]",
        ["trainer.rampup_batch_size: its first batch 16", "below trainer.global_batch_size = 16"],
    ),
    (
        "rampup_reaches_the_batch",
        "trainer.rampup_batch_size=[8,16,100] trainer.global_batch_size=32",
        [
            "trainer.rampup_batch_size: its increment 16 must divide trainer.global_batch_size - 8"
            " = 24",
            "use 8 or 24",
        ],
    ),
    (
        "rampup_reaches_the_batch",
        "trainer.rampup_batch_size=[12,4,100]",
        [
            "its first batch 12 must be a multiple of trainer.micro_batch_size * data parallel"
            " size = 8",
            "use 8",
        ],
    ),
    (
        "rampup_reaches_the_batch",
        "trainer.rampup_batch_size=[8,12,100] trainer.global_batch_size=32",
        [
            "its increment 12 must be a multiple of trainer.micro_batch_size * data parallel size"
            " = 8",
            "use 8 or 24",
        ],
    ),
    (
        "rampup_reaches_the_batch",
        f"{INTERLEAVED} trainer.rampup_batch_size=[8,8,64] trainer.global_batch_size=32",
        [
            "its first batch 8 must be a multiple of trainer.micro_batch_size * data parallel size"
            " * PP of a virtual pipeline = 16",
            "use 16",
        ],
    ),
    (
        "rampup_reaches_the_batch",
        f"{INTERLEAVED} trainer.rampup_batch_size=[16,8,64] trainer.global_batch_size=48",
        [
            "its increment 8 must be a multiple of trainer.micro_batch_size * data parallel size *"
            " PP of a virtual pipeline = 16",
            "use 16",
        ],
    ),
    (
        "schedule_is_complete",
        "optimizer.lr_warmup_fraction=1",
        ["optimizer.lr_warmup_fraction = 1.0", "from 0 to below 1"],
    ),
    (
        "schedule_is_complete",
        "optimizer.lr_decay_style=WSD",
        ["optimizer.lr_decay_style = WSD", "optimizer.lr_wsd_decay_steps", "null"],
    ),
    (
        "schedule_is_complete",
        "optimizer.lr_wsd_decay_steps=10",
        ["optimizer.lr_wsd_decay_steps = 10", "only WSD reads it", "use null"],
    ),
    (
        "schedule_is_complete",
        "optimizer.lr_decay_style=WSD optimizer.lr_wsd_decay_steps=281",
        ["optimizer.lr_wsd_decay_steps = 281", "at most", "= 280"],
    ),
]

# what is next to a breach, and legal
LEGAL = [
    "launcher.time=6 launcher.sbatch_args.signal=USR1@300",
    "launcher.time=1 launcher.sbatch_args.signal=USR1@30",
    "launcher.time=1-00 launcher.account=lab-7 launcher.partition='a100,h100'"
    " launcher.sbatch_args.job_name=x",
    "launcher.time=1 trainer.mode=preflight",
    "model.moe_router_topk=8",
    "data.seq_length=2048",
    "data.seq_length=127",
    "router=sinkhorn",
    "router=sinkhorn router.moe_z_loss_coeff=0.001 router.moe_input_jitter_eps=0.01"
    " router.moe_router_dtype=fp64",
    "router=balanced",
    "router=balanced router.moe_z_loss_coeff=0.001 router.moe_input_jitter_eps=0.01"
    " router.moe_router_dtype=fp64 router.moe_router_pre_softmax=true"
    " router.moe_router_topk_scaling_factor=2",
    "router=balanced trainer.recompute_granularity=full trainer.recompute_method=uniform"
    " trainer.recompute_num_layers=1",
    "router=none",
    "router.moe_router_enable_expert_bias=true router.moe_router_score_function=sigmoid",
    "dispatcher.moe_expert_capacity_factor=1.5 dispatcher.moe_pad_expert_input_to_capacity=true",
    f"{TE} parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true"
    " model.moe_grouped_gemm=true",
    f"{TE} parallel.context_parallel_size=2 parallel=ep1 trainer.devices=4"
    " trainer.global_batch_size=8 parallel.num_distributed_optimizer_instances=4",
    f"{TE} trainer.precision=fp8 trainer.accelerator=gpu",
    "parallel=ep1 parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true",
    "parallel.context_parallel_size=2 trainer.devices=4 parallel.expert_tensor_parallel_size=2",
    LOCAL,
    "model.moe_grouped_gemm=false model.hidden_size=190",
    "trainer.accelerator=gpu trainer.precision=bf16 model.attention_backend=fused",
    "model.attention_backend=flash",
    "trainer.recompute_granularity=selective trainer.recompute_modules=[moe_act]",
    "model.extra.window_size=null",
    f"{INTERLEAVED} model.extra.microbatch_group_size_per_vp_stage=2"
    " model.extra.overlap_p2p_comm=true",
    f"{TE} model.extra.window_size=[128,0]",
    "optimizer.overlap_param_gather=true optimizer.overlap_grad_reduce=true",
    "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2",
    "trainer.recompute_granularity=full trainer.recompute_method=block"
    " trainer.recompute_num_layers=2",
    "trainer.recompute_granularity=selective trainer.recompute_modules=[core_attn,moe]",
    f"{INDEXED} data.split='90,10,0'",
    f"{INDEXED} data.data_path=[1,corpus,1,corpus2,1,a/corpus]",
    "data.split='90,0,10' trainer.limit_val_batches=0",
    "router=combined",
    "model.moe_router_topk=1 router.moe_router_pre_softmax=true",
    "router.moe_router_num_groups=4 router.moe_router_group_topk=1",
    "dispatcher=flex trainer.accelerator=gpu",
    f"{SHARED} dispatcher.moe_shared_expert_overlap=true",
    "optimizer.optimizer=sgd optimizer.use_distributed_optimizer=false",
    f"{OFFLOAD} trainer.offload_modules=[core_attn,attn_proj]",
    "trainer.accelerator=gpu optimizer.optimizer_cpu_offload=true"
    " optimizer.optimizer_offload_fraction=1",
    "parallel=fsdp trainer.accelerator=gpu checkpoint=none",
    "trainer.rampup_batch_size=[8,8,100]",
    f"{INTERLEAVED} trainer.rampup_batch_size=[16,16,64] trainer.global_batch_size=48",
    "optimizer.lr_decay_style=WSD optimizer.lr_wsd_decay_steps=280",
    "optimizer.lr_warmup_steps=null optimizer.lr_warmup_fraction=0",
    "optimizer.min_lr=0.002",
    "optimizer.lr_warmup_steps=299",
    "parallel=ep8 trainer.micro_batch_size=1",
    "trainer.recompute_granularity=full trainer.recompute_method=block"
    " trainer.recompute_num_layers=4",
    "trainer.recompute_granularity=full trainer.recompute_method=uniform"
    " trainer.recompute_num_layers=2",
    "parallel=fsdp parallel.data_parallel_sharding_strategy=optim trainer.accelerator=gpu"
    " checkpoint=none",
    "parallel=ep1 trainer.devices=1 trainer.micro_batch_size=1 trainer.rampup_batch_size=[1,1,1]",
    "dispatcher=flex trainer.accelerator=gpu parallel.expert_tensor_parallel_size=2",
    "dispatcher=flex trainer.accelerator=gpu parallel=ep1 parallel.expert_tensor_parallel_size=2",
    "router.moe_router_num_groups=2 router.moe_router_group_topk=2",
    "trainer.accelerator=gpu launcher.gpus_per_node=2",
    "run_dir=.",
    "launcher.sbatch_args.exclusive=false launcher.sbatch_args.nice=100",
]


RULE = {rule.__name__: rule for rule in RULES}
KEY = re.compile(rf"\b(?:{'|'.join(vars(config_of()))})\.\w+(?:\.\w+)?")
TYPED = re.compile(r"([a-z]\w*(?:\.\w+)*) ?= ?(\S+)")  # key=value, or group=option
VALUE = re.compile(r"(?:at least )?(\d+|null|true|false|auto|softmax|none|vanilla)\b")
# what a hint says in words, where no single value is the answer
PROSE = {
    "minutes (90), 12:00:00 (hours)",
    "2-00:00:00 (days)",
    "more experts a token",
    "more nodes",
    "a larger pipeline",
    "a second part",
    "more TP",
    "CP",
    "none alone",
    "balanced alone",
    "only auxiliary losses",
    "both",
    "neither",
    "the whole path, in a shell $HOME/tokens",
}


def offers(problem: str, plan: Plan) -> list[list[tuple[str, str]]]:
    """What a problem says to use instead, each as (key, value): of the key that it names, or of the
    first in it.
    """
    _, there, hint = problem.rpartition("; use ")
    found = []
    for part in hint.split(", or ") if there else []:
        (key, *_) = KEY.findall(problem)
        nodes = plan.config.trainer.num_nodes
        for text in part.removesuffix(" ranks").split(" or "):
            if typed := TYPED.findall(text):
                key = typed[0][0]
                found.append(typed)
            elif text not in PROSE:
                value = VALUE.match(text)[1]
                found.append(
                    [(key, str(int(value) // nodes) if part.endswith(" ranks") else value)]
                )
    if found and (ramp := re.match(r"\S+ its (first batch|increment) ", problem)):
        place = ramp[1] == "increment"
        sizes = list(plan.config.trainer.rampup_batch_size)
        whole = [[*sizes[:place], int(value), *sizes[place + 1 :]] for ((_, value),) in found]
        found = [[(key, str(sizes).replace(" ", ""))] for sizes in whole]
    return found


def with_offer(overrides: list[str], offer: list[tuple[str, str]]) -> list[str]:
    """The command line with what was offered typed: instead of what set its keys before."""
    keys = tuple(f"{key}=" for key, _ in offer)
    return [word for word in overrides if not word.startswith(keys)] + [
        f"{key}={value}" for key, value in offer
    ]


def shape(problem: str) -> str:
    """A problem without its numbers: two of one shape are the same breach."""
    return re.sub(r"\d+", "#", problem.split(";")[0])


@pytest.mark.parametrize("rule, overrides, fragments", CASES)
def test_a_rule_refuses_with_key_and_numbers_and_what_it_offers_is_legal(
    rule, overrides, fragments
):
    plan = derived(*overrides.split())
    problems = broken_rules(plan)
    matching = [
        problem for problem in problems if all(fragment in problem for fragment in fragments)
    ]
    assert len(matching) == 1, problems
    assert "\n" not in matching[0]
    if fragments[-1].startswith("use "):
        assert matching[0].endswith(fragments[-1])
    assert matching[0] in RULE[rule](plan)
    for offer in offers(matching[0], plan):
        for key, value in offer:
            assert key not in legal_keys() or show(value_of(plan.config, key)) != value, (
                "what is refused is offered"
            )
        changed = broken_rules(derived(*with_offer(overrides.split(), offer)))
        assert shape(matching[0]) not in map(shape, changed), offer


FAULTY = {  # a fault: a layout that meets it, the last version that has it, the first without
    "expert_gradients_over_tp": (
        f"{TE} parallel=ep1 parallel.tensor_model_parallel_size=2",
        (0, 18),
        (0, 19),
    ),
    "per_token_auxiliary_loss": (
        "parallel.context_parallel_size=2 model.extra.calculate_per_token_loss=true",
        (0, 18),
        (0, 19),
    ),
}


@pytest.mark.parametrize("fault", upstream.FAULTS, ids=lambda fault: fault.name)
def test_a_layout_at_which_megatron_is_wrong_is_refused_until_acknowledged(fault, monkeypatch):
    overrides, faulty, mended = FAULTY[fault.name]
    words = overrides.split()
    words += ["parallel.sequence_parallel=true"] * any("tensor_model" in word for word in words)
    monkeypatch.setattr(upstream, "megatron_version", lambda: faulty)
    (problem,) = problems_in(quick_tree_of(*words))
    for fragment in (
        "megatron-core 0.18",
        fault.file,
        fault.wrong,
        f"parallel.acknowledged_faults=[{fault.name}]",
    ):
        assert fragment in problem
    acknowledged = f"parallel.acknowledged_faults=[{fault.name}]"
    assert problems_in(quick_tree_of(*words, acknowledged)) == []
    for version in (mended, None):  # without Megatron-Core only a plan can be made
        monkeypatch.setattr(upstream, "megatron_version", lambda version=version: version)
        assert problems_in(quick_tree_of(*words)) == []
        # a recipe is for both versions
        assert problems_in(quick_tree_of(*words, acknowledged)) == []


@pytest.mark.parametrize("overrides", LEGAL)
def test_what_is_legal_breaks_no_rule(overrides):
    assert plan_of(*overrides.split())


def test_every_rule_has_a_case_and_every_case_a_rule():
    assert {rule for rule, _, _ in CASES} == set(RULE)


def test_every_breach_that_a_rule_words_has_a_case(monkeypatch):
    monkeypatch.setattr(upstream, "megatron_version", lambda: (0, 18))
    faulty = [("upstream_faults_are_acknowledged", overrides) for overrides, *_ in FAULTY.values()]
    reached = {rule.__name__: set() for rule in RULES}
    for rule, overrides in [*((rule, overrides) for rule, overrides, _ in CASES), *faulty]:
        found = RULE[rule](derived(*overrides.split()))
        reached[rule].update(found.gi_frame.f_lineno for _ in found)  # of the yield that waits
    for rule in RULES:
        lines, first = inspect.getsourcelines(rule)
        nodes = ast.walk(ast.parse("".join(lines)))
        words = {
            first - 1 + node.lineno
            for node in nodes
            if isinstance(node, (ast.Yield, ast.YieldFrom))
        }
        assert reached[rule.__name__] == words, rule.__name__


@pytest.mark.parametrize("overrides", [[], *[[f"+recipe={name}"] for name in RECIPES]], ids=str)
def test_the_default_and_every_recipe_break_no_rule(overrides):
    assert plan_of(*overrides)


def test_all_broken_rules_are_reported_together_in_the_order_of_the_rules():
    overrides = [
        "parallel.expert_model_parallel_size=5",
        "model.moe_router_topk=9",
        "optimizer.min_lr=1",
    ]
    problems = problems_of(*overrides)
    plan = derived(*overrides)
    assert problems == [problem for rule in RULES for problem in rule(plan)]
    assert {problem.split(" ")[0] for problem in problems} == {
        "parallel.expert_model_parallel_size",
        "trainer.global_batch_size",
        "model.moe_router_topk",
        "optimizer.min_lr",
    }
