"""Deliberate faults of layouts: the certificate detects and names each.

The ranks of a layout get a fault before they measure; the one-rank run is correct. The same layouts
pass without the fault.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composing import quick_tree_of
from megatron.core import parallel_state

from mixtrain.config import tensor_schema
from mixtrain.config.planner import make_plan
from mixtrain.config.typed_config import from_hydra
from mixtrain.engine import model, shards
from mixtrain.proof.parity import certificate
from mixtrain.proof.parity.layouts import ParityLayout
from mixtrain.training import measured_step
from mixtrain.training.compare_steps import Verdict

pytestmark = pytest.mark.long
SMALL = ["+shrink=parity", "model.num_layers=2", "checkpoint=none"]
EP2 = ParityLayout.on(2, ep=2)
TP2 = ParityLayout.on(2, tp=2)
CP2 = ParityLayout.on(2, cp=2)


class Bench:
    """The one-rank run, and comparisons of layouts with it."""

    def __init__(self, folder: Path):
        self.config = from_hydra(quick_tree_of(*SMALL))
        self.folder = folder
        self.count = 0
        self.one = certificate.run_one_rank(
            make_plan(ParityLayout().applied_to(self.config)), folder / "wholes.pt", folder
        )

    def at(self, layout: ParityLayout, sabotage=lambda identity: None) -> Verdict:
        def work(plan, identity, wholes):
            sabotage(identity)
            return measured_step.measure(plan, identity, wholes)

        self.count += 1
        plan = make_plan(layout.applied_to(self.config))
        return certificate.compare_layout(
            plan, self.one, self.folder / "wholes.pt", self.folder / str(self.count), work
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def with_built_model(change) -> None:
    """Apply `change` to every model chunk that this process builds."""
    build = model.build_chunk

    def changed(*arguments):
        chunk = build(*arguments)
        change(chunk)
        return chunk

    model.build_chunk = changed


def experts_of(chunk: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in chunk.named_parameters() if "experts.weight1" in name]


@pytest.mark.parametrize("layout", [EP2, TP2, CP2], ids=str)
def test_without_a_fault_the_layout_is_within_the_limits(bench, layout):
    verdict = bench.at(layout)
    assert verdict.outside == [] and str(verdict) == "within the limits"
    assert 0 < verdict.differences["gradient"] < 1e-5  # not 0: something was compared


def test_the_gradient_of_the_experts_doubled_on_one_rank(bench):
    def sabotage(identity) -> None:
        if identity.rank == 1:
            with_built_model(
                lambda chunk: [
                    weight.register_hook(lambda g: 2 * g) for weight in experts_of(chunk)
                ]
            )

    verdict = bench.at(EP2, sabotage)
    assert verdict.tensors[0] == "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    assert any(
        "gradient of decoder.layers.0.mlp.experts" in line and "on rank 1" in line
        for line in verdict.outside
    )
    assert not any("gradient" in line and "on rank 0" in line for line in verdict.outside)


def test_one_expert_forgotten_in_the_norm(bench):
    """Clipping then changes every weight too much, although every gradient is correct."""

    def sabotage(identity) -> None:
        def forget(chunk) -> None:
            experts_of(chunk)[0].shared = True  # marks a weight that another stage counts

        if identity.rank == 1:
            with_built_model(forget)

    verdict = bench.at(EP2, sabotage)
    assert verdict.outside[0].startswith("grad_norm of step 1 on rank 0 differs")
    assert verdict.differences["gradient"] < 1e-5 and verdict.differences["lm_loss"] > 0


def test_the_auxiliary_loss_dropped_under_tensor_parallelism(bench):
    def sabotage(identity) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        TopKRouter._apply_aux_loss = lambda self, probs, *_, **__: probs

    verdict = bench.at(TP2, sabotage)
    assert verdict.outside[0].startswith("balance of step 1 on rank 0 differs")
    assert "decoder.layers.1.mlp.router.weight" in verdict.tensors


def test_the_auxiliary_loss_scaled_by_the_tensor_ranks(bench):
    """The log shows the correct value; only gradients differ."""

    def sabotage(identity) -> None:
        from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

        scale = MoEAuxLossAutoScaler.set_loss_scale
        MoEAuxLossAutoScaler.set_loss_scale = lambda value: scale(
            value * parallel_state.get_tensor_model_parallel_world_size()
        )

    verdict = bench.at(TP2, sabotage)
    assert (
        "balance of step 1" not in str(verdict.outside)
        and "decoder.layers.1.mlp.router.weight" in verdict.tensors
    )


def test_rotary_positions_shifted_on_one_rank_under_context_parallelism(bench):
    def sabotage(identity) -> None:
        from megatron.core.models.common.embeddings import rotary_pos_embedding

        right = rotary_pos_embedding.get_pos_emb_on_this_cp_rank
        if identity.rank == 1:
            rotary_pos_embedding.get_pos_emb_on_this_cp_rank = lambda *given: right(*given).roll(
                1, dims=0
            )

    verdict = bench.at(CP2, sabotage)
    assert verdict.outside[0].startswith("lm_loss of step 1")
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in verdict.tensors


def test_a_norm_that_is_not_added_up_over_the_sequence(bench):
    """Without the mark that sequence parallelism needs, the first norm is named."""

    def sabotage(identity) -> None:
        def lose(chunk) -> None:
            for name, parameter in chunk.named_parameters():
                if "layernorm" in name:
                    parameter.sequence_parallel = False

        with_built_model(lose)

    verdict = bench.at(TP2, sabotage)
    assert verdict.tensors[0] == "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"


def test_a_part_that_no_rank_holds(bench):
    def sabotage(identity) -> None:
        every = shards.shards
        train = measured_step.two_steps

        def train_then_lose(*arguments):
            trained = train(*arguments)
            shards.shards = lambda chunk: (
                shard
                for shard in every(chunk)
                if shard.key != "output_layer.weight" or identity.rank == 0
            )
            return trained

        measured_step.two_steps = train_then_lose

    verdict = bench.at(TP2, sabotage)
    rows = tensor_schema.shapes(bench.config)["output_layer.weight"]
    assert verdict.outside == [
        f"output_layer.weight: the ranks hold {rows[0] * rows[1] // 2} of {rows[0] * rows[1]}"
        " elements"
    ]


@pytest.mark.parametrize("at_fault", [0, 1])
def test_ranks_that_fail_are_outside_with_what_the_one_at_fault_said(bench, at_fault):
    def sabotage(identity) -> None:
        if identity.rank == at_fault:
            raise ValueError("no such thing")

    verdict = bench.at(EP2, sabotage)
    assert f"rank {at_fault}: ValueError: no such thing" in str(verdict)
    assert set(verdict.differences.values()) == {float("inf")}
