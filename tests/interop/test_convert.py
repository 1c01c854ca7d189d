"""Every tensor and key has one name on each side, nothing is lost between them, and what is no
Mixtral is refused.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from composing import config_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mixtrain.config import tensor_schema
from mixtrain.config.families import FAMILIES, family_of
from mixtrain.config.plan import resolve
from mixtrain.config.schema import Config
from mixtrain.errors import UserError
from mixtrain.interop.convert import hf_config
from mixtrain.interop.convert.tensor_mapping import mapped_slices
from mixtrain.interop.convert.weights import to_hugging_face, to_megatron

SMALL = [
    "model.num_layers=3",
    "model.hidden_size=16",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.moe_ffn_hidden_size=12",
    "model.num_moe_experts=4",
    "model.vocab_size=32",
]
QWEN2_MOE = [
    "model.add_qkv_bias=true",
    "model.moe_shared_expert_intermediate_size=20",
    "model.moe_shared_expert_gate=true",
]
OLMOE = ["model.qk_layernorm=true", "model.qk_layernorm_over=projection", "model.kv_channels=4"]
SHAPES = {
    "two groups": [],
    "one group": ["model.num_query_groups=1"],
    "a group a head": ["model.num_query_groups=4"],
    "a large head": ["model.kv_channels=24"],
    "one layer, two experts": ["model.num_layers=1", "model.num_moe_experts=2"],
    "tied embeddings": ["model.untie_embeddings_and_output_weights=false"],
    "Qwen3-MoE": ["model.qk_layernorm=true"],
    "Qwen2-MoE": QWEN2_MOE,
    "OLMoE": OLMOE,
}
QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def small(*overrides: str) -> Config:
    return resolve(config_of(*SMALL, *overrides))


def numbered(config: Config) -> dict[str, torch.Tensor]:
    """Megatron tensors in which no two entries are alike, so that each can be found again."""
    wholes = {}
    first = 0
    for key, shape in tensor_schema.shapes(config).items():
        count = torch.Size(shape).numel()
        wholes[key] = torch.arange(first, first + count, dtype=torch.float32).view(shape)
        first += count
    assert first < 2**24  # fp32 tells them apart
    return wholes


def files_of(model: PreTrainedModel, folder) -> dict[str, torch.Tensor]:
    """The tensors that transformers writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_equal(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> None:
    assert set(these) == set(those)
    assert [name for name in these if not torch.equal(these[name], those[name])] == []


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_again_is_where_it_was(shape, layout):
    config = small(*SHAPES[shape])
    wholes = numbered(config)
    assert_equal(to_megatron(config, to_hugging_face(config, wholes, layout)), wholes)


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_those_that_transformers_keeps_and_writes(shape, tmp_path):
    config = small(*SHAPES[shape])
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**hf_config.to_hugging_face(config))
    )
    kept = {name: tensor.data for name, tensor in model.named_parameters()}
    written = files_of(model, tmp_path)
    wholes = to_megatron(config, written)
    assert_equal(to_megatron(config, kept), wholes)
    assert_equal(to_hugging_face(config, wholes), written)
    assert_equal(to_hugging_face(config, wholes, "fused"), kept)


def test_a_group_of_qkv_holds_its_queries_then_its_key_then_its_value():
    config = small()
    # groups; two queries, key, value; head; hidden
    qkv = numbered(config)[QKV][1].view(2, 4, 8, 16)
    named = to_hugging_face(config, numbered(config))
    query, key, value = (
        named[f"model.layers.1.self_attn.{letter}_proj.weight"] for letter in "qkv"
    )
    for head in range(4):
        assert torch.equal(query[head * 8 : head * 8 + 8], qkv[head // 2, head % 2])
    for group in range(2):
        assert torch.equal(key[group * 8 : group * 8 + 8], qkv[group, 2])
        assert torch.equal(value[group * 8 : group * 8 + 8], qkv[group, 3])


def test_gate_is_w1_and_above_up_which_is_w3():
    config = small()
    wholes = numbered(config)
    expert = "model.layers.2.block_sparse_moe.experts.3."
    named = to_hugging_face(config, wholes)
    assert torch.equal(named[expert + "w1.weight"], wholes[FC1][2, 3, :12])
    assert torch.equal(named[expert + "w3.weight"], wholes[FC1][2, 3, 12:])
    assert torch.equal(named[expert + "w2.weight"], wholes[FC2][2, 3])


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_what_need_not_be_copied_is_a_view(layout):
    config = small()
    wholes = numbered(config)
    own = {tensor.untyped_storage().data_ptr() for tensor in wholes.values()}
    named = to_hugging_face(config, wholes, layout)
    copied = [
        name for name, tensor in named.items() if tensor.untyped_storage().data_ptr() not in own
    ]
    assert len(copied) == 3 * 3 and all(
        name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in copied
    )
    assert all(tensor.is_contiguous() for tensor in named.values())  # as safetensors wants them


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_each_part_of_a_megatron_tensor_can_be_converted_alone(layout):
    config = small()
    wholes = numbered(config)
    named = to_hugging_face(config, wholes, layout)
    covered = dict.fromkeys(wholes, 0)
    used = []
    for part in mapped_slices(config, layout):
        memory = torch.empty(part.shape)
        part.fill_megatron(memory, {name: named[name] for name in part.names})
        assert torch.equal(memory, wholes[part.key][part.stack_index])
        covered[part.key] += memory.numel()
        used += part.names
    assert covered == {key: tensor.numel() for key, tensor in wholes.items()}
    assert sorted(used) == sorted(named)


FEATURES = {  # as overrides
    "mixtral": [],
    "qwen3_moe": ["model.qk_layernorm=true"],
    "qwen2_moe": QWEN2_MOE,
    "olmoe": OLMOE,
}


def test_every_tensor_of_the_contract_has_a_row_or_is_refused_by_name():
    assert FAMILIES.keys() == FEATURES.keys()
    for name, overrides in FEATURES.items():
        assert family_of(small(*overrides)) is FAMILIES[name]
        keys = FAMILIES[name].tensor_mapping("hub").keys()
        assert keys == tensor_schema.shapes(small(*overrides)).keys()
        assert keys == FAMILIES[name].tensor_mapping("fused").keys()
    keys = FAMILIES["mixtral"].tensor_mapping("hub").keys()
    for words in (["router=expert_bias"], ["model.moe_shared_expert_intermediate_size=8"]):
        config = small(*words)
        assert set(tensor_schema.shapes(config)) - keys
        assert hf_config.export_problems(config)


def test_a_tensor_without_a_row_and_a_row_without_a_tensor_are_errors(monkeypatch):
    with pytest.raises(
        RuntimeError, match="no row of .*families/mixtral.py covers .*shared_experts.linear_fc1"
    ):
        list(mapped_slices(small("model.moe_shared_expert_intermediate_size=8"), "hub"))
    mixtral = FAMILIES["mixtral"]
    spare = mixtral.tensors[0]._replace(key="decoder.layers.mlp.linear_fc3.weight")
    monkeypatch.setitem(FAMILIES, "mixtral", replace(mixtral, tensors=[*mixtral.tensors, spare]))
    with pytest.raises(
        RuntimeError,
        match="rows of .*families/mixtral.py match no tensor of the model: "
        "decoder.layers.mlp.linear_fc3.weight",
    ):
        list(mapped_slices(small(), "hub"))


def without(named: dict, name: str) -> dict:
    return {other: tensor for other, tensor in named.items() if other != name}


BROKEN = {
    "missing": (lambda named: without(named, W1), f"{W1} is missing, of shape (12, 16)"),
    "extra": (
        lambda named: named | {"model.layers.3.input_layernorm.weight": torch.ones(16)},
        "model.layers.3.input_layernorm.weight is not a tensor of this model",
    ),
    "shape": (
        lambda named: named | {W1: torch.ones(16, 12)},
        f"{W1} has shape (16, 12); the configuration makes it (12, 16)",
    ),
    "dtype": (
        lambda named: named | {W1: torch.ones(12, 16, dtype=torch.bfloat16)},
        f"{W1} is torch.bfloat16, but model.embed_tokens.weight is torch.float32; all must be the"
        " same; --dtype fp32, bf16 or fp16 makes them so",
    ),
    "fp16": (
        lambda named: {name: tensor.half() for name, tensor in named.items()},
        "model.embed_tokens.weight is torch.float16; weights are torch.float32 or torch.bfloat16",
    ),
    "two layouts": (
        lambda named: named | {"model.layers.0.mlp.gate.weight": torch.ones(4, 16)},
        "two layouts at once: model.layers.0.block_sparse_moe.experts.0.w1.weight (files) and"
        " model.layers.0.mlp.gate.weight (transformers 5 in memory)",
    ),
    "another model": (
        lambda named: {"transformer.wte.weight": torch.ones(2)},
        "no router or expert of a Mixtral is among the 1 tensors: neither"
        " model.layers.0.block_sparse_moe.experts.0.w1.weight nor"
        " model.layers.0.mlp.experts.down_proj",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_tensors_that_are_not_the_models_are_refused_by_name(fault):
    config = small()
    (breaking, problem) = BROKEN[fault]
    with pytest.raises(UserError) as refused:
        to_megatron(config, breaking(to_hugging_face(config, numbered(config))))
    assert refused.value.problems == (problem,)


def test_a_wrong_size_names_some_tensors_and_counts_the_others():
    named = to_hugging_face(small(), numbered(small()))
    with pytest.raises(UserError) as refused:
        to_megatron(small("model.moe_ffn_hidden_size=10"), named)
    assert len(refused.value.problems) == 6
    # of 3 layers, 4 experts and 3 matrices
    assert refused.value.problems[-1] == "... and 31 more such tensors"


def test_megatron_tensors_are_checked_as_well():
    config = small()
    wholes = numbered(config)
    wholes[FC1] = wholes[FC1][:2]
    with pytest.raises(
        UserError, match=r"linear_fc1.weight has shape \(2, 4, 24, 16\); .* \(3, 4, 24, 16\)"
    ):
        to_hugging_face(config, wholes)
