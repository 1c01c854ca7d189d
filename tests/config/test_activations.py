"""The plan's bound of activations against what autograd really keeps: never above it, and no less
than half of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from composing import derived, plan_of
from rank_workers import run_ranks
from test_parity import CP, EP, ETP, PP, SHARED, TINY, TP, VPP, random_batches

from mixtrain.config.plan import Plan
from mixtrain.engine import model, optimizer, process_groups
from mixtrain.engine.layers.attention import CoreAttention
from mixtrain.engine.layers.experts import Experts
from mixtrain.engine.layers.norm import RMSNorm
from mixtrain.training import loop
from mixtrain.training.signals import StopRequest

SMALL = [*TINY, "model.hidden_size=128", "data.seq_length=64"]
GPU = "as on a GPU"  # PyTorch's operations in the place of ours, as on a GPU


def full(method: str, each: int) -> list[str]:
    words = [f"trainer.recompute_method={method}", f"trainer.recompute_num_layers={each}"]
    return ["trainer.recompute_granularity=full", *words]


def selective(modules: str) -> list[str]:
    return ["trainer.recompute_granularity=selective", f"trainer.recompute_modules=[{modules}]"]


RUNS = {
    "plain": [EP + "1"],
    "as on a GPU": [EP + "1", GPU],
    "bf16": [EP + "1", "trainer.precision=bf16"],
    "top-4": [EP + "1", "model.moe_router_topk=4"],
    "two sequences": [EP + "1", "trainer.micro_batch_size=2", "trainer.global_batch_size=2"],
    "a loop over experts": [EP + "1", "model.moe_grouped_gemm=false"],
    "shared expert": [EP + "1", SHARED],
    "local": [EP + "1", "model.transformer_impl=local", "model.moe_grouped_gemm=false"],
    "drop": [EP + "1", "dispatcher=drop"],
    "drop_and_pad": [EP + "1", "dispatcher=drop_and_pad"],
    "little room": [EP + "1", "dispatcher=drop", "dispatcher.moe_expert_capacity_factor=0.25"],
    "EP2": [EP + "2"],
    "TP2xEP2xETP2": [EP + "2", ETP, *TP],
    "TP2": [EP + "1", *TP],
    "CP2": [EP + "1", CP],
    "PP2": [EP + "1", PP + "2"],
    "PP4": [EP + "1", PP + "4"],
    "PP4, two microbatches": [EP + "1", PP + "4", "trainer.global_batch_size=2"],
    "PP2xVPP2": [EP + "1", PP + "2", VPP],
    "PP2xVPP2, two microbatches": [EP + "1", PP + "2", VPP, "trainer.global_batch_size=2"],
    "PP2, uneven": [EP + "1", PP + "2", "parallel.num_layers_in_first_pipeline_stage=1"],
    "full, uniform 1": [EP + "1", *full("uniform", 1)],
    "full, uniform 2": [EP + "1", *full("uniform", 2)],
    "full, block 1": [EP + "1", *full("block", 1)],
    "full, block 4": [EP + "1", *full("block", 4)],
    "full, PP2xVPP2": [EP + "1", PP + "2", VPP, *full("uniform", 1)],
    "core_attn": [EP + "1", *selective("core_attn")],
    "layernorm": [EP + "1", *selective("layernorm")],
    "moe": [EP + "1", *selective("moe")],
    "layernorm and moe": [EP + "1", *selective("layernorm,moe")],
    "moe_act": [EP + "1", GPU, *selective("moe_act")],
    "shared_experts": [EP + "1", SHARED, *selective("shared_experts")],
}


class Kept:
    """The tensors that autograd keeps: the most bytes at any time, the model's own weights not
    counted.
    """

    def __init__(self, weights: set[int]):
        self.weights = weights
        self.held = weakref.WeakSet()
        self.most = 0

    def keep(self, tensor: torch.Tensor) -> Held:
        held = Held(tensor.detach())
        self.held.add(held)
        sizes = {
            held.address: held.size() for held in self.held if held.address not in self.weights
        }
        self.most = max(self.most, sum(sizes.values()))
        return held


class Held:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.address = tensor.untyped_storage().data_ptr()

    def size(self) -> int:
        """Now: what will be recomputed has given its memory back."""
        return self.tensor.untyped_storage().nbytes()


def losses_that_keep(kept: Kept, losses: Callable) -> Callable:
    """Our own loss keeps the logits where the hooks of autograd do not see them."""

    def counted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = losses(logits, labels)
        found.grad_fn.metadata["logits"] = kept.keep(logits)
        return found

    return counted


def most_kept(plan: Plan, identity) -> tuple[int, int]:
    """(pipeline stage, bytes) of a rank in a training step."""
    from megatron.core import parallel_state

    with process_groups.start(plan, identity) as here:
        training = optimizer.build(plan, model.build(plan, here.device))
        weights = [p for chunk in training.chunks for p in chunk.parameters()]
        kept = Kept({parameter.untyped_storage().data_ptr() for parameter in weights})
        model.token_losses = losses_that_keep(kept, model.token_losses)
        streams = [iter(random_batches(plan, 1)) for _ in training.chunks]
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda held: held.tensor):
            loop.train_step(
                plan,
                here,
                training,
                streams,
                StopRequest(),
                1,
                plan.config.trainer.global_batch_size,
            )
        return parallel_state.get_pipeline_model_parallel_rank(), kept.most


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_keeps_at_least_what_the_plan_says_and_at_most_twice_that(
    name, tmp_path, monkeypatch
):
    overrides = [*SMALL, *(word for word in RUNS[name] if word != GPU)]
    plan = plan_of(*overrides)
    message = plan.stage_activation_bytes
    if GPU in RUNS[name]:
        message = derived(*overrides, "trainer.accelerator=gpu").stage_activation_bytes
        for layer in (CoreAttention, Experts, RMSNorm):
            monkeypatch.setattr(layer, "_is_cpu", staticmethod(lambda _: False))
    found = run_ranks(plan.world_size, lambda identity: most_kept(plan, identity), tmp_path)
    for stage, least in enumerate(message):
        measured = [most for number, most in found if number == stage]
        mean = sum(measured) / len(measured)  # of the experts' rows a rank has more, another less
        assert mean / 2 <= least <= mean
