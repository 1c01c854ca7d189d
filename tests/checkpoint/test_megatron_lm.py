"""Megatron-LM reads mixtrain's checkpoints: the fields of common.pt, Megatron-Core's load and save.

Megatron-LM itself is not installed here; docs/checkpoints.md describes how its loader was tested.
"""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from checkpoints import differ, tensors_of, unequal
from composing import derived, plan_of
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from rank_workers import run_ranks
from test_parity import CP, EP, ETP, PLAIN, PP, TP, VPP
from test_resume import BF16, SHORT, path_of, start

from mixtrain.checkpoint import content, optimizer_state, safe
from mixtrain.checkpoint.megatron_args import ARGS, megatron_args
from mixtrain.checkpoint.state import RunState
from mixtrain.engine import model, optimizer, process_groups, shards

# what load_args_from_checkpoint of Megatron-LM (core_v0.16.1, core_r0.19.0) reads from `args`
SET = """
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups
    group_query_attention kv_channels max_position_embeddings position_embedding_type
    add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent
    rotary_interleaved add_bias_linear disable_bias_linear add_qkv_bias squared_relu swiglu
    untie_embeddings_and_output_weights apply_layernorm_1p normalization
    apply_query_key_layer_scaling attention_dropout hidden_dropout hybrid_override_pattern
    hybrid_layer_pattern spec hybrid_attention_ratio hybrid_mlp_ratio
    mtp_hybrid_override_pattern mtp_num_layers mtp_use_repeated_layer num_experts moe_layer_freq
    moe_ffn_hidden_size moe_router_topk moe_token_dispatcher_type moe_router_pre_softmax
    moe_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias
    moe_shared_expert_intermediate_size moe_router_score_function moe_router_enable_expert_bias
    moe_router_topk_scaling_factor mamba_state_dim mamba_head_dim mamba_num_groups
    mamba_num_heads is_hybrid_model heterogeneous_layers_config_path
    heterogeneous_layers_config_encoded_json moe_latent_size tokenizer_model tokenizer_type
    tiktoken_pattern padded_vocab_size ckpt_format tensor_model_parallel_size
    pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    num_layers_per_virtual_pipeline_stage expert_model_parallel_size
""".split()
# what load_checkpoint, check_checkpoint_args and Megatron-Core's load also read
READ = """
    world_size data_parallel_size no_save_rng no_save_optim ckpt_fully_parallel_save
    data_parallel_random_init consumed_train_samples skipped_train_samples
    consumed_valid_samples global_batch_size make_vocab_size_divisible_by async_save
    async_strategy
""".split()


@pytest.mark.parametrize("name", [*SET, *READ])
def test_megatron_lm_finds_the_field(name):
    assert name in ARGS


PLANS = {
    "8x7b": ["+recipe=mixtral_8x7b_tp2_pp4_ep4"],
    "several losses": ["router=combined"],
    "everything": [
        "model.moe_shared_expert_intermediate_size=64",
        "model.qk_layernorm=true",
        "router=expert_bias",
    ],
    "fp8": [
        "model=mixtral_8x7b",
        "trainer=node8",
        "trainer.precision=fp8",
        "model.transformer_impl=transformer_engine",
    ],
}


@pytest.mark.parametrize("overrides", PLANS.values(), ids=PLANS)
def test_the_args_are_plain_values_that_torch_reads_without_running_anything(overrides, tmp_path):
    args = megatron_args(derived(*overrides), RunState())
    torch.save({"args": args}, tmp_path / "common.pt")
    torch.serialization.add_safe_globals([Namespace])  # as Megatron-Core does
    assert torch.load(tmp_path / "common.pt", weights_only=True)["args"] == args
    plain = (bool, int, float, str, type(None))
    for name, value in vars(args).items():
        values = value if type(value) is list else [value]
        assert all(type(item) in plain for item in values), name


def test_the_args_of_the_published_model():
    args = megatron_args(plan_of(*PLANS["8x7b"]), RunState(step=100, consumed_samples=102400))
    wanted = {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "moe_ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "group_query_attention": True,
        "kv_channels": 128,
        "num_experts": 8,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_grouped_gemm": True,
        "max_position_embeddings": 32768,
        "position_embedding_type": "rope",
        "rotary_base": 1000000,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": 32000,
        "seq_length": 4096,
        "moe_router_load_balancing_type": "aux_loss",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "expert_model_parallel_size": 4,
        "sequence_parallel": True,
        "world_size": 64,
        "data_parallel_size": 8,
        "global_batch_size": 1024,
        "bf16": True,
        "iteration": 100,
        "consumed_train_samples": 102400,
        "ckpt_format": "torch_dist",
        "no_save_rng": False,
        "no_save_optim": False,
        "use_distributed_optimizer": True,
    }
    assert {name: getattr(args, name) for name in wanted} == wanted


CHUNKS = "parallel.virtual_pipeline_model_parallel_size="
FOLLOWS = [
    (["model.num_query_groups=4", "model.num_attention_heads=4"], "group_query_attention", False),
    (["model.num_layers=8", PP + "2", VPP], "num_layers_per_virtual_pipeline_stage", 2),
    (
        [
            "model.num_layers=6",
            PP + "2",
            VPP,
            "parallel.account_for_embedding_in_pipeline_split=true",
            "parallel.account_for_loss_in_pipeline_split=true",
        ],
        "num_layers_per_virtual_pipeline_stage",
        2,
    ),
    (["model.num_layers=8", PP + "2"], "num_layers_per_virtual_pipeline_stage", None),
    (
        ["parallel.pipeline_model_parallel_layout='Et|t|t|tL'", PP + "2"],
        "num_layers_per_virtual_pipeline_stage",
        None,
    ),
    (
        ["parallel.pipeline_model_parallel_layout='Et|t|t|tL'", PP + "2"],
        "virtual_pipeline_model_parallel_size",
        2,
    ),
    (
        ["parallel.num_layers_in_first_pipeline_stage=1", PP + "2"],
        "decoder_first_pipeline_num_layers",
        1,
    ),
    (["optimizer=sgd"], "no_save_optim", True),
    (["trainer.accelerator=cpu"], "no_save_rng", True),
    (["trainer=node8"], "no_save_rng", False),
    (["trainer.precision=fp32"], "bf16", False),
    (
        ["data=indexed", "data.data_path=[x]", "data.tokenizer=there"],
        "tokenizer_type",
        "HuggingFaceTokenizer",
    ),
    (["data=indexed", "data.data_path=[x]", "data.tokenizer=there"], "tokenizer_model", "there"),
    (["data=mock"], "tokenizer_type", "NullTokenizer"),
    (["data=stdlib"], "tokenizer_type", None),
    (["router=combined"], "moe_router_load_balancing_type", ["global_aux_loss", "seq_aux_loss"]),
    (["model.extra={layernorm_zero_centered_gamma: true}"], "apply_layernorm_1p", True),
    (["model.extra={rotary_interleaved: true}"], "rotary_interleaved", True),
    (["optimizer.lr_warmup_steps=7"], "lr_warmup_iters", 7),
]


@pytest.mark.parametrize(
    "overrides, name, value",
    FOLLOWS,
    ids=[f"{overrides[0]}: {name}" for overrides, name, _ in FOLLOWS],
)
def test_an_arg_follows_from_the_plan(overrides, name, value):
    assert getattr(megatron_args(derived(*overrides), RunState()), name) == value


LAYOUTS = {
    "EP1": [EP + "1"],
    "EP2": [EP + "2"],
    "EP2, two of each expert": [EP + "2", "trainer.devices=4"],
    "EP2 in bf16": [EP + "2", *BF16],
    "EP2 without the distributed optimizer": [EP + "2", PLAIN],
    "TP2xPP2": [EP + "1", PP + "2", *TP],
    "EP2xETP2": [EP + "2", ETP, *TP],
    "PP2xVPP2": [EP + "1", PP + "2", VPP],
    "CP2xEP2": [EP + "2", CP],
}
# layouts that read a checkpoint of another layout
ELSEWHERE = {"EP2 without the distributed optimizer": [EP + "2"]}
QUICK = ("EP2", "EP2 without the distributed optimizer", "TP2xPP2")
# Megatron-Core's save takes seconds
SAVED_AGAIN = ("EP1", "EP2", "EP2 in bf16", "EP2xETP2", "PP2xVPP2")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS],
)
def test_upstream_loads_what_was_saved_and_saves_the_same_keys_shapes_and_bits(name, tmp_path):
    run_dir, codes, log = start(tmp_path, "trainer.max_steps=2", *LAYOUTS[name])
    assert codes == {0}, log
    ours = path_of(run_dir, 2)
    theirs = tmp_path / "theirs"
    plan = plan_of(*SHORT, "seed=4321", *ELSEWHERE.get(name, LAYOUTS[name]))
    theirs.mkdir()

    def load_and_save(identity) -> list[str]:
        with process_groups.start(plan, identity) as ranks:
            training = optimizer.build(plan, model.build(plan, ranks.device))
            emulate_fused_adam(training)
            assert len([*differing_keys(training, ours)]) > 10  # there is something to load
            load(training, ours)
            assert optimizer_state.steps_done(training) == 2
            differing = [*differing_keys(training, ours)]
            if name in SAVED_AGAIN:
                save(training, theirs)
            return differing

    assert run_ranks(plan.world_size, load_and_save, tmp_path / "ranks") == [[]] * plan.world_size
    if name in SAVED_AGAIN:
        assert unequal(ours, theirs) == []
        index = safe.read_metadata(theirs)
        unpickled = pickle.loads((theirs / ".metadata").read_bytes())
        assert index.storage_data == unpickled.storage_data
        assert index.state_dict_metadata.keys() == unpickled.state_dict_metadata.keys()
        # 0.19 writes no common.pt
        assert objects_of(theirs) - objects_of(ours) <= {"common_state/shard_0_1"}
        assert all(
            "_extra_state" in key or "rng_state" in key
            for key in objects_of(ours) - objects_of(theirs)
        )


def emulate_fused_adam(training: optimizer.Training) -> None:
    """Give PyTorch's Adam the state of fused Adam, which Megatron-Core's load expects.

    PyTorch's Adam has no state before its first step, and counts steps in a tensor per parameter.
    """
    optimizer_state.initialize(training, "adam")
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_except_step(self, parameter, tensors):
        group, number = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][number]]
        set_states(self, parameter, {**tensors, "step": state["step"]})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_except_step


def upstream_state_dict(training: optimizer.Training, metadata: dict, **how) -> dict:
    """Return the state dict of Megatron-LM: model, optimizer and random streams."""
    metadata = {
        **metadata,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    chunks = [
        shards.unwrap(chunk).sharded_state_dict(metadata=metadata) for chunk in training.chunks
    ]
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    tree = dict(zip(names, chunks, strict=True))
    rng = content.rng_object(content.rng_state().data, by_data_rank=False)
    return {
        **tree,
        "optimizer": training.optimizer.sharded_state_dict(tree, metadata=metadata, **how),
        "rng_state": rng,
    }


def load(training: optimizer.Training, path: Path) -> None:
    common = dist_checkpointing.load_common_state_dict(path)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    loaded = dist_checkpointing.load(
        upstream_state_dict(training, metadata, is_loading=True), str(path)
    )
    for number, chunk in enumerate(training.chunks):
        chunk.load_state_dict(
            loaded["model" if len(training.chunks) == 1 else f"model{number}"], strict=True
        )
    training.optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["rng_state"][0]["torch_rng_state"].dtype == torch.uint8
    assert loaded["iteration"] == 2 and loaded["args"].consumed_train_samples == 16


def save(training: optimizer.Training, path: Path) -> None:
    metadata = content.FORMAT | {"distrib_optim_fully_reshardable_mem_efficient": True}
    dist_checkpointing.save(
        upstream_state_dict(training, metadata), str(path), content_metadata=metadata
    )


def differing_keys(training: optimizer.Training, path: Path):
    """Yield keys of this rank's weights and optimizer state that differ from a checkpoint."""
    tensors = tensors_of(path)
    for chunk in training.chunks:
        for shard in shards.shards(chunk):
            if differ(shard.data.contiguous(), shard.of(tensors[shard.key]).contiguous()):
                yield shard.key
    for sharded in optimizer_state.sharded(training, "adam"):
        slices = tuple(
            slice(start, start + size)
            for start, size in zip(sharded.global_offset, sharded.local_shape, strict=True)
        )
        if differ(sharded.data.contiguous(), tensors[sharded.key][slices].contiguous()):
            yield sharded.key


def objects_of(path: Path) -> set[str]:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    return {key for key, kind in metadata.state_dict_metadata.items() if not hasattr(kind, "size")}


EVERYTHING = PLANS["everything"]
# the modules of Transformer Engine in a layer that Megatron-LM saves with an _extra_state
STATEFUL = """
    self_attention.linear_qkv self_attention.linear_proj self_attention.q_layernorm
    self_attention.k_layernorm pre_mlp_layernorm mlp.shared_experts.linear_fc1
    mlp.shared_experts.linear_fc2
""".split()


@pytest.mark.parametrize(
    "overrides",
    [
        [EP + "1"],
        [EP + "2", ETP, *TP],
        [EP + "2", PP + "2"],
        [EP + "2", "model.transformer_impl=local", "model.moe_grouped_gemm=false"],
    ],
    ids=["EP1", "EP2xETP2", "EP2xPP2", "local"],
)
def test_every_object_that_transformer_engine_asks_for_is_there(overrides, tmp_path):
    run_dir, codes, log = start(tmp_path, "trainer.max_steps=1", *EVERYTHING, *overrides)
    assert codes == {0}, log
    layers = range(4)
    experts = range(8)
    wanted = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_4"
        for module in STATEFUL
        for layer in layers
    }
    prefix = "decoder.layers.mlp.experts.experts"
    wanted |= {
        f"{prefix}.linear_fc{number}._extra_state/shard_{layer}.{expert}_4.8"
        for number in (1, 2)
        for layer in layers
        for expert in experts
    }
    objects = objects_of(path_of(run_dir, 1))
    assert {key for key in objects if "rng_state" not in key} == wanted | {
        "decoder.final_layernorm._extra_state/shard_0_1"
    }


def test_the_schedule_is_counted_in_sequences_and_the_groups_have_what_fused_adam_reads(tmp_path):
    overrides = [EP + "2", "optimizer.lr_warmup_steps=3"]
    run_dir, codes, log = start(tmp_path, "trainer.max_steps=2", *overrides)
    assert codes == {0}, log
    common = dist_checkpointing.load_common_state_dict(path_of(run_dir, 2))
    schedule = common["opt_param_scheduler"]
    names = ("num_steps", "lr_warmup_steps", "lr_decay_steps", "wd_incr_steps")
    assert [schedule[name] for name in names] == [2 * 8, 3 * 8, 8 * 8, 2 * 8]
    assert common["optimizer"].keys() == {0, 1}
    for entry in common["optimizer"].values():
        for group in entry["optimizer"]["param_groups"]:
            assert group["bias_correction"] is True and group["step"] == 2 and "params" not in group
    assert {key for key in objects_of(path_of(run_dir, 2)) if "rng_state" in key} == {
        "rng_state/shard_0.0.0_1.1.2",
        "rng_state/shard_0.0.1_1.1.2",  # for Megatron-LM 0.16
        "rng_state/shard_0.0_1.1",  # for Megatron-LM before and after 0.16
    }
