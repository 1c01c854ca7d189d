"""Every implementation writes the same keys and shapes to disk at every layout."""

from __future__ import annotations

import re

import pytest
import torch
from composing import ROOT, config_of, derived, plan_of
from rank_workers import run_ranks
from test_parity import EP, PP, TINY

from mixtrain.config import memory, tensor_schema
from mixtrain.engine import model, process_groups, shards

TP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
ALL_OF_IT = [
    "model.moe_shared_expert_intermediate_size=64",
    "model.moe_shared_expert_gate=true",
    "model.add_qkv_bias=true",
    "model.qk_layernorm=true",
    "router=expert_bias",
]
OVER_PROJECTION = ["model.qk_layernorm=true", "model.qk_layernorm_over=projection"]
LOCAL = ["model.transformer_impl=local", "model.moe_grouped_gemm=false"]
LAYOUTS = {
    "torch": [EP + "1"],
    "torch, loop over experts": [EP + "1", "model.moe_grouped_gemm=false"],
    "torch, EP2 over PP2 in two chunks": [
        EP + "2",
        PP + "2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    ],
    "torch, TP2 and ETP2": [EP + "1", "parallel.expert_tensor_parallel_size=2", *TP],
    "torch, everything": [EP + "2", *TP, *ALL_OF_IT],
    "torch, norm over the projection": [EP + "1", *TP, *OVER_PROJECTION],
    "torch, tied embeddings": [EP + "1", "model.untie_embeddings_and_output_weights=false"],
    "local": [EP + "2", *LOCAL],
    "local, everything": [EP + "1", *LOCAL, *ALL_OF_IT],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_keys_and_shapes_on_disk_are_those_of_the_contract(name, tmp_path):
    plan = plan_of(*TINY, *LAYOUTS[name])

    def on_disk(identity) -> dict[str, list[int]]:
        with process_groups.start(plan, identity) as here:
            found = {}
            for chunk in model.build(plan, here.device):
                state = chunk.sharded_state_dict()
                tensors = shards._leaves(shards.apply_factories({"": state}) or {"": state})
                found |= {tensor.key: list(tensor.global_shape) for tensor in tensors}
            return found

    together: dict[str, tuple[int, ...]] = {}
    for found in run_ranks(plan.world_size, on_disk, tmp_path):
        together |= {key: tuple(shape) for key, shape in found.items() if "_extra_state" not in key}
    assert together == tensor_schema.shapes(plan.config)


@pytest.mark.parametrize(
    "words",
    [
        ["model=mixtral_8x7b"],
        ["model=mixtral_8x22b"],
        ["model=qwen3_30b_a3b"],
        ["model=mixtral_small"],
        ALL_OF_IT,
        OVER_PROJECTION,
    ],
)
def test_the_contract_counts_the_parameters_that_the_costs_count(words):
    config = derived(*words).config
    kinds = {row.key: row.init_kind for row in tensor_schema.TENSORS}
    sizes = {key: torch.Size(shape).numel() for key, shape in tensor_schema.shapes(config).items()}
    assert sum(
        size for key, size in sizes.items() if kinds[key] != "buffer"
    ) == memory.total_parameters(config.model)


def test_the_contract_of_the_published_model():
    shapes = tensor_schema.shapes(derived("model=mixtral_8x7b").config)
    assert shapes["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (
        32,
        8,
        2 * 14336,
        4096,
    )
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (32, 4096 + 2 * 1024, 4096)
    assert len(shapes) == 10


@pytest.mark.parametrize("name", ["torch", "torch, TP2 and ETP2", "local"])
def test_what_is_filled_in_by_place_is_read_back_by_place(name, tmp_path):
    """Distinct numbers go into a model at a layout; one rank reads the same full tensors back."""
    plan = plan_of(*TINY, *LAYOUTS[name])
    wholes = {
        key: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        for key, shape in tensor_schema.shapes(plan.config).items()
    }

    def fill_and_read(identity) -> bool:
        with process_groups.start(plan, identity) as here:
            chunks = model.build(plan, here.device)
            shards.fill(chunks, wholes)
            if identity.world_size == 1:
                again = shards.read(plan, chunks)
                return again.keys() == wholes.keys() and all(
                    torch.equal(again[key], wholes[key]) for key in wholes
                )
            parts = [shard for chunk in chunks for shard in shards.shards(chunk)]
            assert any(shard.data.numel() < wholes[shard.key][0].numel() for shard in parts)
            return all(torch.equal(shard.data, shard.of(wholes[shard.key])) for shard in parts)

    assert all(run_ranks(plan.world_size, fill_and_read, tmp_path))


def test_a_rank_that_holds_only_a_part_cannot_be_read_as_the_whole(tmp_path):
    plan = plan_of(*TINY, EP + "2")

    def read(identity) -> str:
        with process_groups.start(plan, identity) as here:
            with pytest.raises(RuntimeError) as stopped:
                shards.read(plan, model.build(plan, here.device))
            return str(stopped.value)

    assert all("linear_fc1.weight" in said for said in run_ranks(2, read, tmp_path))


def test_no_other_module_knows_the_name_of_a_tensor():
    """Except for the table of Hugging Face's names beside it."""
    root = ROOT / "mixtrain"
    for file in root.rglob("*.py"):
        if file.name == "tensor_schema.py" or file.parent.name in ("convert", "families"):
            continue
        assert not re.search(
            r"linear_qkv\.weight|linear_fc[12]\.weight|router\.weight", file.read_text()
        ), file


def test_a_shape_is_that_of_the_configuration():
    shapes = tensor_schema.shapes(config_of(*TINY))
    assert (
        shapes["embedding.word_embeddings.weight"] == (256, 64)
        and "decoder.layers.mlp.router.expert_bias" not in shapes
    )
