"""Router counts are exact in every precision; bf16 cannot count past 256."""

from __future__ import annotations

import pytest
import torch
from composing import plan_of
from rank_workers import run_ranks
from test_parity import EP, TINY

from mixtrain.engine import model, moe_metrics, optimizer, process_groups
from mixtrain.training import loop
from mixtrain.training.signals import StopRequest

pytestmark = pytest.mark.long
STEPS = 20
WORDS = [
    "trainer.precision=bf16",
    "data.seq_length=256",
    "model.max_position_embeddings=256",
    "model.num_layers=2",
]
ROUTERS = (
    "aux_loss",
    "seq_aux_loss",
    "global_aux_loss",
    "combined",
    "none",
    "sinkhorn",
    "expert_bias",
)
BUFFERS = {  # of each router, beside a layer's others
    "expert_bias": {"expert_bias", "local_tokens_per_expert"},
    "global_aux_loss": {"global_tokens_per_expert", "ga_steps"},
    "combined": {"global_tokens_per_expert", "ga_steps"},
}


@pytest.mark.parametrize("implementation", ["torch", "local"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_buffer_of_the_model_is_fp32_or_whole_numbers(
    router, precision, implementation, tmp_path
):
    words = [
        f"router={router}",
        f"trainer.precision={precision}",
        f"model.transformer_impl={implementation}",
    ]
    words += ["model.moe_grouped_gemm=false"] if implementation == "local" else []
    plan = plan_of(*TINY, EP + "1", *words)
    (buffers,) = run_ranks(1, lambda identity: buffers_of(plan, identity), tmp_path)
    assert {name.rpartition(".")[2] for name in buffers} == BUFFERS.get(router, set())
    assert {*buffers.values()} <= {"torch.float32", "torch.int64"}


def buffers_of(plan, identity) -> dict[str, str]:
    with process_groups.start(plan, identity) as here:
        (chunk,) = model.build(plan, here.device)
        return {name: str(buffer.dtype) for name, buffer in chunk.named_buffers()}


@pytest.mark.parametrize("experts", ["1", "2"])
@pytest.mark.parametrize("router", ["expert_bias", "global_aux_loss"])
def test_in_bf16_a_router_counts_every_token_over_twenty_steps(router, experts, tmp_path):
    """A step has 4,096 assignments per layer; the reference counts them as integers."""
    plan = plan_of(*TINY, *WORDS, EP + experts, f"router={router}", f"trainer.max_steps={STEPS}")
    results = run_ranks(plan.world_size, lambda identity: counted(plan, identity), tmp_path)
    assert all(result == results[0] for result in results) and len(results[0]) == STEPS
    for step in results[0]:
        if router == "expert_bias":
            assert step["moved"] == step["expected"]
        else:
            assert step["counted"] == step["expected"]
    assert any(max(max(layer) for layer in step["loads"]) > 256 for step in results[0])


def counted(plan, identity) -> list[dict]:
    """Per step: what the routers counted, or how biases moved, and the same from integer counts."""
    from test_parity import random_batches

    with process_groups.start(plan, identity) as here:
        training = optimizer.build(plan, model.build(plan, here.device))
        routers = [
            m
            for chunk in training.chunks
            for m in chunk.modules()
            if hasattr(m, "reset_global_aux_loss_tracker")
        ]
        load = moe_metrics.ExpertLoad(plan, training.chunks, here.device)
        seen = []
        for router in routers:  # Megatron-Core forgets its counts when the step ends
            router.reset_global_aux_loss_tracker = lambda router=router: seen.append(taken(router))
        stream = iter(random_batches(plan, STEPS))
        steps = []
        for step in range(1, STEPS + 1):
            load.clear()
            seen.clear()
            before = [bias.clone() for bias in moe_metrics.expert_biases(training.chunks)]
            loop.train_step(
                plan,
                here,
                training,
                [stream],
                StopRequest(),
                step,
                plan.config.trainer.global_batch_size,
            )
            loads = load.collect()
            after = moe_metrics.expert_biases(training.chunks)
            steps.append(
                {"loads": loads}
                | (signs(before, after, loads) if before else {"counted": list(seen)})
            )
            if not before:
                steps[-1]["expected"] = [
                    {"tokens": layer, "microbatches": plan.num_microbatches} for layer in loads
                ]
        return steps


def taken(router) -> dict:
    found = {
        "tokens": router.global_tokens_per_expert.tolist(),
        "microbatches": router.ga_steps.item(),
    }
    router.global_tokens_per_expert.zero_()
    router.ga_steps.zero_()
    return found


def signs(before: list[torch.Tensor], after: list[torch.Tensor], loads: list[list[int]]) -> dict:
    mean = [sum(layer) / len(layer) for layer in loads]
    return {
        "moved": [torch.sign(new - old).tolist() for old, new in zip(before, after, strict=True)],
        "expected": [
            torch.sign(torch.tensor([middle - count for count in layer])).tolist()
            for middle, layer in zip(mean, loads, strict=True)
        ],
    }
