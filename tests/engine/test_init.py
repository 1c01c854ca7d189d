"""Weights depend on the seed alone, not on the layout; the meta device takes no memory."""

from __future__ import annotations

import hashlib

import pytest
import torch
from composing import plan_of
from rank_workers import run_ranks
from test_parity import EP, PP, TINY

from mixtrain.config.memory import stage_parameters
from mixtrain.config.plan import Plan
from mixtrain.engine import model, process_groups, shards, weight_init
from mixtrain.system.rank_identity import Identity

VPP = "parallel.virtual_pipeline_model_parallel_size="


def fingerprints(plan: Plan, identity: Identity) -> dict[str, str]:
    """Return a hash of every shard of this rank, by key, numbers and slices."""
    found = {}
    with process_groups.start(plan, identity) as here:
        for chunk in model.build(plan, here.device):
            for shard in shards.shards(chunk):
                found[str((shard.key, shard.numbers, shard.slices))] = hashlib.sha256(
                    shard.data.detach().contiguous().numpy().tobytes()
                ).hexdigest()
    return found


def all_fingerprints(folder, *overrides: str) -> dict[str, str]:
    """Return the shards of all ranks; equal shards must hold equal numbers."""
    plan = plan_of(*TINY, *overrides)
    together = {}
    for found in run_ranks(plan.world_size, lambda identity: fingerprints(plan, identity), folder):
        for place, digest in found.items():
            assert together.setdefault(place, digest) == digest, place
    return together


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict[str, str]:
    return all_fingerprints(tmp_path_factory.mktemp("one"), EP + "1")


@pytest.mark.parametrize(
    "layout", [[EP + "4"], [EP + "2", PP + "2"], [EP + "1", PP + "2", VPP + "2"]]
)
def test_every_weight_is_the_same_at_another_layout(layout, one_rank, tmp_path):
    assert all_fingerprints(tmp_path, *layout) == one_rank


def test_another_seed_gives_other_weights_but_for_the_norms(one_rank, tmp_path):
    other = all_fingerprints(tmp_path, EP + "1", "seed=1235")
    assert {place for place in other if other[place] == one_rank[place]} == {
        place for place in other if "layer_norm" in place or "layernorm" in place
    }


def test_no_two_tensors_are_alike_but_the_norms(one_rank):
    drawn = [digest for place, digest in one_rank.items() if "norm" not in place]
    # layers of qkv, proj and experts of gate, up, down
    assert len(set(drawn)) == len(drawn) > 4 * (2 + 4 * 3)


def statistics(plan: Plan, identity: Identity) -> dict[str, list[float]]:
    """Mean and standard deviation by name; the parameter count of config/memory.py."""
    with process_groups.start(plan, identity) as here:
        (chunk,) = model.build(plan, here.device)
        assert sum(parameter.numel() for parameter in chunk.parameters()) == sum(
            stage_parameters(plan.config.model, plan.config.parallel, stage=0)
        )
        return {
            shard.key: [shard.data.mean().item(), shard.data.std().item()]
            for shard in shards.shards(chunk)
        }


def test_weights_are_normal_with_the_std_that_megatron_gives_them(tmp_path):
    plan = plan_of(*TINY, EP + "1", "model.init_method_std=0.02")
    (found,) = run_ranks(1, lambda identity: statistics(plan, identity), tmp_path)
    assert found["embedding.word_embeddings.weight"] == pytest.approx([0, 0.02], abs=1e-3)
    assert found["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == pytest.approx(
        [0, 0.02 / 8**0.5], abs=1e-3
    )
    assert found["decoder.final_layernorm.weight"] == [1, 0]


def attributes(plan: Plan, identity: Identity) -> list[bool]:
    """Attributes that Megatron-Core sets on parameters and its optimizer reads."""
    with process_groups.start(plan, identity) as here:
        (chunk,) = model.build(plan, here.device)
        marks = {
            name: getattr(parameter, "allreduce", True)
            for name, parameter in chunk.named_parameters()
        }
        return [not marks[name] for name in marks if "experts" in name] + [
            marks[name] for name in marks if "experts" not in name
        ]


def test_experts_keep_the_mark_that_keeps_them_out_of_the_dense_reduction(tmp_path):
    plan = plan_of(*TINY, EP + "2")
    assert all(
        all(marks) for marks in run_ranks(2, lambda identity: attributes(plan, identity), tmp_path)
    )


def test_a_tensor_that_no_row_describes_is_an_error():
    with pytest.raises(RuntimeError, match="no row of TENSORS.*decoder.surprise"):
        weight_init.draw(plan_of(), "decoder.surprise", (), (2,))


def test_materialise_refuses_to_leave_a_tensor_without_memory():
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.empty(2, device="meta"))

    with pytest.raises((RuntimeError, NotImplementedError), match="table|meta"):
        weight_init.materialise(Odd(), torch.device("cpu"))
