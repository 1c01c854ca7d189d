"""The layout does not change the result: same seed and global batch, same loss and gradient norm.

fp32 on real gloo ranks compared with one rank. Tolerances: sums of a few hundred fp32 terms in
another order differ by about 1e-7 relative; 1e-5 allows for that and nothing else. Three Adam steps
amplify the difference by 1/sqrt(v) of entries near zero, hence 1e-4.
"""

from __future__ import annotations

import pytest
import torch
from composing import plan_of
from rank_workers import run_ranks

from mixtrain.config.plan import Plan
from mixtrain.engine import model, optimizer, process_groups
from mixtrain.engine.layers.attention import CoreAttention
from mixtrain.engine.layers.experts import Experts
from mixtrain.engine.layers.norm import RMSNorm
from mixtrain.engine.moe_metrics import ExpertLoad, collect_balancing_loss
from mixtrain.system.rank_identity import Identity
from mixtrain.training import loop
from mixtrain.training.signals import StopRequest

TINY = [
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=16",
    "model.moe_ffn_hidden_size=96",
    "model.vocab_size=256",
    "data=mock",
    "data.seq_length=32",
    "trainer.micro_batch_size=1",
    "trainer.global_batch_size=8",
    "trainer.max_steps=3",
    "trainer.limit_val_batches=1",
    "optimizer.lr=1e-3",
    "optimizer.min_lr=1e-4",
    "optimizer.lr_warmup_steps=0",
    "trainer.timeout_minutes=1",
]
EP = "parallel.expert_model_parallel_size="
PP = "parallel.pipeline_model_parallel_size="
VPP = "parallel.virtual_pipeline_model_parallel_size=2"
TP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
CP = "parallel.context_parallel_size=2"
ETP = "parallel.expert_tensor_parallel_size=2"
OVERLAPPED = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
PLAIN = "optimizer.use_distributed_optimizer=false"
LAYOUTS = {
    "EP2": [EP + "2"],
    "EP4": [EP + "4"],
    "PP2": [EP + "1", PP + "2"],
    "EP2xPP2": [EP + "2", PP + "2"],
    "DP2": [EP + "1", "trainer.devices=2"],
    "DP2 without the distributed optimizer": [EP + "1", "trainer.devices=2", PLAIN],
    "EP2xDP2, expert data parallel 2": [EP + "2", "trainer.devices=4"],
    "EP2 without the distributed optimizer": [EP + "2", PLAIN],
    "EP2, allgather": [EP + "2", "dispatcher=allgather"],
    "EP4, allgather": [EP + "4", "dispatcher=allgather"],
    "EP2, full recompute": [
        EP + "2",
        "trainer.recompute_granularity=full",
        "trainer.recompute_method=uniform",
        "trainer.recompute_num_layers=1",
    ],
    "EP2, selective recompute": [
        EP + "2",
        "trainer.recompute_granularity=selective",
        "trainer.recompute_modules=[core_attn,layernorm,moe]",
    ],
    "EP2, overlapped": [EP + "2", *OVERLAPPED],
    "PP2xVPP2": [EP + "1", PP + "2", VPP],
    "TP2": [EP + "1", *TP],
    "TP2xEP2": [EP + "2", *TP],
    "TP2xEP2xETP2": [EP + "2", ETP, *TP],
    "TP2xETP2, allgather": [EP + "1", ETP, *TP, "dispatcher=allgather"],
    "TP2xPP2": [EP + "1", PP + "2", *TP],
    "TP2xPP2xVPP2": [EP + "1", PP + "2", VPP, *TP],
    "TP2, full recompute": [
        EP + "1",
        *TP,
        "trainer.recompute_granularity=full",
        "trainer.recompute_method=uniform",
        "trainer.recompute_num_layers=1",
    ],
    "CP2": [EP + "1", CP],
    "CP2xTP2xEP2": [EP + "2", CP, *TP],
    "CP2xPP2, overlapped": [EP + "1", CP, PP + "2", *OVERLAPPED],
}


def three_steps(plan: Plan, identity: Identity) -> dict:
    """Train three steps on one batch; return losses, norms, loads, balance, held-out loss."""
    with process_groups.start(plan, identity) as here:
        training = optimizer.build(plan, model.build(plan, here.device))
        load = ExpertLoad(plan, training.chunks, here.device)
        streams = [iter(random_batches(plan)) for _ in training.chunks]
        losses = []
        norms = []
        loads = []
        balances = []
        batch = plan.config.trainer.global_batch_size
        for step in range(1, 4):
            load.clear()
            loss, norm, _ = loop.train_step(
                plan, here, training, streams, StopRequest(), step, batch
            )
            losses.append(loss)
            norms.append(norm)
            loads.append(load.collect())
            balances.append(collect_balancing_loss(plan, plan.num_microbatches, here.device))
        unseen = random_batches(plan, plan.config.trainer.limit_val_batches)
        held_out = loop.evaluate(plan, here, training, unseen, step)
    return {
        "losses": losses,
        "norms": norms,
        "loads": loads,
        "balances": balances,
        "held_out": held_out,
    }


def random_batches(plan: Plan, steps: int = 3) -> list[dict[str, torch.Tensor]]:
    """This rank's microbatches in the order of mixtrain.data.batches, the same every step."""
    from megatron.core import parallel_state

    dp = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    length = plan.config.data.seq_length
    batch = plan.config.trainer.global_batch_size
    micro = plan.config.trainer.micro_batch_size
    made = []
    for first in range(rank * micro, steps * batch, dp * micro):
        tokens = torch.stack(
            [random_tokens(plan, number % batch) for number in range(first, first + micro)]
        )
        made.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(micro, length),
                "position_ids": torch.arange(length).expand(micro, length),
            }
        )
    return made


def random_tokens(plan: Plan, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randint(
        0, plan.config.model.vocab_size, (plan.config.data.seq_length + 1,), generator=generator
    )


def measure(overrides: list[str], folder) -> dict:
    """Return the figures of a layout; every rank must report the same ones."""
    plan = plan_of(*TINY, *overrides)
    results = run_ranks(plan.world_size, lambda identity: three_steps(plan, identity), folder)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return measure([EP + "1"], tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_rank_computes(name, one_rank, tmp_path):
    here = measure(LAYOUTS[name], tmp_path)
    assert_same(here, one_rank)
    assert here["held_out"] == pytest.approx(one_rank["held_out"], rel=1e-4)


def test_the_loss_falls_and_every_token_is_sent_to_two_experts(one_rank):
    assert one_rank["losses"][2] < one_rank["losses"][0] - 0.01
    assert all(sum(layer) == 2 * 8 * 32 for layer in one_rank["loads"][0])
    assert one_rank["balances"][0] == pytest.approx(1.0, abs=0.2)


SHARED = "model.moe_shared_expert_intermediate_size=64"
GROUPED = ["router.moe_router_num_groups=4", "router.moe_router_group_topk=2"]
OVER_PROJECTION = ["model.qk_layernorm=true", "model.qk_layernorm_over=projection"]
QWEN2 = [SHARED, "model.moe_shared_expert_gate=true", "model.add_qkv_bias=true"]
# Settings that give the same result at every layout: each is compared with one rank with the same
# setting.
SWITCHES = {
    "seq_aux_loss": ["router=seq_aux_loss"],
    "aux_loss and seq_aux_loss": [
        "router.moe_router_load_balancing_type=[aux_loss,seq_aux_loss]",
        "router.moe_aux_loss_coeff=[0.01,0.001]",
    ],
    "sinkhorn": ["router=sinkhorn"],
    "none": ["router=none"],
    "z-loss": ["router.moe_z_loss_coeff=0.001"],
    "expert_bias": ["router=expert_bias", "router.moe_router_bias_update_rate=0.1"],
    "sigmoid": [
        "router.moe_router_score_function=sigmoid",
        "router.moe_router_topk_scaling_factor=2.5",
    ],
    "pre-softmax": ["router.moe_router_pre_softmax=true"],
    "router in fp64": ["router.moe_router_dtype=fp64"],
    "group-limited": GROUPED,
    "capacity": ["dispatcher=drop", "dispatcher.moe_expert_capacity_factor=0.75"],
    "capacity, padded": ["dispatcher=drop_and_pad", "dispatcher.moe_expert_capacity_factor=0.75"],
    "capacity by position": [
        "dispatcher=drop",
        "dispatcher.moe_expert_capacity_factor=0.75",
        "dispatcher.moe_token_drop_policy=position",
    ],
    "shared expert": [SHARED],
    "shared expert, overlapped": [SHARED, "dispatcher.moe_shared_expert_overlap=true"],
    "qk norm": ["model.qk_layernorm=true"],
    "qk norm over the projection": OVER_PROJECTION,
    "qkv bias, gated shared expert": QWEN2,
    "tied embeddings": ["model.untie_embeddings_and_output_weights=false"],
    "sgd": ["optimizer=sgd", "optimizer.lr_warmup_steps=0"],
}
SPLITS = {
    "first stage of 1": ["parallel.num_layers_in_first_pipeline_stage=1"],
    "last stage of 1": ["parallel.num_layers_in_last_pipeline_stage=1"],
    "first stage of 3, last of 1": [
        "parallel.num_layers_in_first_pipeline_stage=3",
        "parallel.num_layers_in_last_pipeline_stage=1",
    ],
    "layout": ["parallel.pipeline_model_parallel_layout='Ettt|tL'"],
    "layout with chunks": ["parallel.pipeline_model_parallel_layout='Et|t|t|tL'"],
    "layout with a stage of the embedding alone, TP2": [
        "parallel.pipeline_model_parallel_layout='E|t*4L'",
        *TP,
    ],
    "layout with a stage of the embedding alone, DP2": [
        "parallel.pipeline_model_parallel_layout='E|t*4L'",
        "trainer.devices=4",
    ],
    "layout with a stage of the loss alone": ["parallel.pipeline_model_parallel_layout='Et*4|L'"],
    "buckets": ["optimizer=adam_overlap", "optimizer.bucket_size=10000", *TINY[-4:-1]],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The figures of one rank with given settings, measured once each."""
    known = {}

    def figures(switches: list[str]) -> dict:
        key = tuple(switches)
        if key not in known:
            known[key] = measure([EP + "1", *switches], tmp_path_factory.mktemp("alone"))
        return known[key]

    return figures


def assert_same(here: dict, there: dict) -> None:
    assert here["losses"][0] == pytest.approx(there["losses"][0], rel=1e-5)
    assert here["norms"][0] == pytest.approx(there["norms"][0], rel=1e-5)
    assert here["losses"][2] == pytest.approx(there["losses"][2], rel=1e-4)
    assert here["loads"][0] == there["loads"][0]
    if there["balances"][0] is None:
        assert here["balances"][0] is None
    else:
        assert here["balances"][0] == pytest.approx(there["balances"][0], rel=1e-5)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_computes_the_same_over_experts_stages_and_data(switch, alone, tmp_path):
    """EP2 x PP2 on four ranks: one layer and two data-parallel ranks per stage."""
    words = ["model.num_layers=2", *SWITCHES[switch]]
    assert_same(measure([EP + "2", PP + "2", *words], tmp_path), alone(words))


# Settings with their own weights or sums to split over tensor and context ranks, all at once.
SPLIT_TOO = {
    "weights and losses": [
        SHARED,
        "model.qk_layernorm=true",
        "model.untie_embeddings_and_output_weights=false",
        "router.moe_z_loss_coeff=0.001",
        *SWITCHES["aux_loss and seq_aux_loss"],
    ],
    "qk norm over the projection": OVER_PROJECTION,
    "qkv bias, gated shared expert": QWEN2,
    "gated shared expert, overlapped": [*QWEN2, "dispatcher.moe_shared_expert_overlap=true"],
    "expert bias, overlapped shared expert": [
        *SWITCHES["expert_bias"],
        *SWITCHES["shared expert, overlapped"],
    ],
}


@pytest.mark.parametrize("layout", [[EP + "2", *TP], [EP + "1", CP]], ids=["TP2xEP2", "CP2"])
@pytest.mark.parametrize("switches", SPLIT_TOO)
def test_a_switch_computes_the_same_over_tensor_and_context_ranks(
    switches, layout, alone, tmp_path
):
    assert_same(measure([*layout, *SPLIT_TOO[switches]], tmp_path), alone(SPLIT_TOO[switches]))


MOE_ACT = "trainer.recompute_modules=[moe_act]"
IMPLEMENTATIONS = {
    "local": ["model.transformer_impl=local", "model.moe_grouped_gemm=false"],
    "torch, a loop over experts": ["model.moe_grouped_gemm=false"],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_implementation_computes_what_another_computes(implementation, one_rank, tmp_path):
    """The same weights from the seed, computed with other operations."""
    assert_same(measure([EP + "2", *IMPLEMENTATIONS[implementation]], tmp_path), one_rank)


def test_tied_embeddings_get_the_gradients_of_both_their_uses(alone, tmp_path):
    """The reference is Megatron-Core's own layers, which add nothing to its buffers themselves."""
    tied = ["model.untie_embeddings_and_output_weights=false"]
    assert_same(measure([EP + "2", *IMPLEMENTATIONS["local"], *tied], tmp_path), alone(tied))


@pytest.mark.parametrize(
    "words", [[], ["trainer.recompute_granularity=selective", MOE_ACT]], ids=["", "moe_act"]
)
def test_a_gpus_path_computes_what_the_cpus_computes(words, one_rank, tmp_path, monkeypatch):
    """On the CPU: grouped_mm with recomputed activation, PyTorch's attention and norm."""
    for layer in (Experts, CoreAttention, RMSNorm):
        monkeypatch.setattr(layer, "_is_cpu", staticmethod(lambda _: False))
    assert_same(measure([EP + "2", *words], tmp_path), one_rank)


@pytest.mark.parametrize("split", SPLITS)
def test_an_uneven_pipeline_computes_what_one_rank_computes(split, alone, tmp_path):
    assert_same(measure([EP + "1", PP + "2", *SPLITS[split]], tmp_path), alone([]))


def test_hybrid_optimizer_sharding_computes_what_one_rank_computes(alone, tmp_path):
    words = [EP + "2", "trainer.devices=4", "parallel.num_distributed_optimizer_instances=2"]
    assert_same(measure(words, tmp_path), alone([]))
