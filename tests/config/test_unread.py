"""What a router does not read is refused: proved with the real router, which computes the same to
the bit with it.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from composing import CONF, config_of, derived
from omegaconf import OmegaConf
from rank_workers import run_ranks  # its import makes Megatron-Core run on the CPU
from test_parity import TINY, random_batches

from mixtrain.config.key_effects import value_of
from mixtrain.config.rules.unread import UNREAD, keys_are_read
from mixtrain.config.transformer_fields import transformer_config_defaults
from mixtrain.engine import model, optimizer, process_groups
from mixtrain.training import loop
from mixtrain.training.signals import StopRequest

ALONE = [*TINY, "parallel=ep1", "model.num_layers=1", "trainer.global_batch_size=2"]
TOKENS = (24, 2)  # of a sequence, sequences
# another value of each key than the one that asks for nothing, and what it goes with
OTHER = {
    "router.moe_z_loss_coeff": [0.1],
    "router.moe_input_jitter_eps": [0.1],
    "router.moe_router_score_function": ["sigmoid"],
    "router.moe_router_pre_softmax": ["true"],
    "router.moe_router_enable_expert_bias": ["true"],
    "router.moe_router_bias_update_rate": [0.1],
    "router.moe_router_force_load_balancing": ["true"],
    "router.moe_router_dtype": ["fp64"],
    "router.moe_router_num_groups": [4, "router.moe_router_group_topk=1"],
    "router.moe_router_group_topk": [1, "router.moe_router_num_groups=4"],
    "router.moe_router_topk_scaling_factor": [2.5],
    "dispatcher.moe_token_drop_policy": ["position"],
}
# the routers, and the keys that each does not read
GROUPS = {"router.moe_router_num_groups", "router.moe_router_group_topk"}
BIAS = {"router.moe_router_enable_expert_bias", "router.moe_router_bias_update_rate"}
SCORES = {
    "router.moe_router_score_function",
    "router.moe_router_pre_softmax",
    "router.moe_router_topk_scaling_factor",
}
POLICY = {"dispatcher.moe_token_drop_policy"}
RATE = {"router.moe_router_bias_update_rate"}
SIGMOID = "router.moe_router_score_function=sigmoid"
ROUTERS = {
    "router=aux_loss": POLICY | RATE,
    "router=seq_aux_loss": POLICY | RATE,
    "router=global_aux_loss": POLICY | RATE,
    "router=combined": POLICY | RATE,
    "router=none": POLICY | RATE,
    "router=forced_balance": POLICY | RATE,
    "router=expert_bias": POLICY | {"router.moe_router_pre_softmax"},
    f"router=aux_loss {SIGMOID}": POLICY | RATE | {"router.moe_router_pre_softmax"},
    "router=sinkhorn": POLICY | SCORES | BIAS | GROUPS,
    "router=balanced": POLICY | BIAS | GROUPS | {"router.moe_router_score_function"},
    "router=aux_loss dispatcher=drop": RATE,
}
FLIPPED = {  # where the router has the other value already
    ("router=forced_balance", "router.moe_router_force_load_balancing"): "false",
    ("router=expert_bias", "router.moe_router_enable_expert_bias"): "false",
    (f"router=aux_loss {SIGMOID}", "router.moe_router_score_function"): "softmax",
}
# Megatron-Core takes no other there
IMPOSSIBLE = ("router=expert_bias", "router.moe_router_score_function")
PAIRS = [pair for pair in product(ROUTERS, OTHER) if pair != IMPOSSIBLE]


def two_ways(router: str, key: str) -> tuple[list[str], list[str]]:
    """The overrides of a router, without and with another value of a key."""
    value, *with_it = OTHER[key]
    words = router.split() + [SIGMOID] * (key == "router.moe_router_enable_expert_bias")
    return words, [*words, f"{key}={FLIPPED.get((router, key), value)}", *with_it]


def routed(*overrides: str) -> list[torch.Tensor]:
    """Of the router of these overrides: its weights and map, and the gradients."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    plan = derived(*ALONE, *overrides)
    config = model.transformer_config(plan)
    router = model.router_class(plan)(config, get_default_pg_collection()).train()
    router.set_layer_number(1)
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.linspace(-1, 1, len(router.expert_bias)))
    router.weight.data.normal_()
    tokens = torch.randn(*TOKENS, config.hidden_size, requires_grad=True)
    weights, routing = router(tokens)
    (weights * torch.randn_like(weights)).sum().backward()
    return [weights, routing, tokens.grad, router.weight.grad]


def trained(here: process_groups.Ranks, *overrides: str) -> list[torch.Tensor]:
    """The loss of three steps: between them the biases move, which no router does by itself."""
    plan = derived(*ALONE, *overrides)
    training = optimizer.build(plan, model.build(plan, here.device))
    batches = iter(random_batches(plan))
    batch = plan.config.trainer.global_batch_size
    steps = [
        loop.train_step(plan, here, training, [batches], StopRequest(), step, batch)
        for step in (1, 2, 3)
    ]
    return [torch.tensor(step[0]) for step in steps]


def compare(identity) -> list[tuple[str, str, bool]]:
    """Of each pair of PAIRS, whether both ways compute the same to the bit."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    def computed(here: process_groups.Ranks, key: str, overrides: list[str]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        get_cuda_rng_tracker().set_states(dict(streams))
        return trained(here, *overrides) if key in RATE else routed(*overrides)

    found = []
    with process_groups.start(derived(*ALONE), identity) as here:
        streams = get_cuda_rng_tracker().get_states()
        # steps first: a router alone would leave Megatron-Core's scale of auxiliary losses in
        # another shape
        for router, key in sorted(PAIRS, key=lambda pair: pair[1] not in RATE):
            one, two = (computed(here, key, overrides) for overrides in two_ways(router, key))
            same = all(torch.equal(a.double(), b.double()) for a, b in zip(one, two, strict=True))
            found.append((router, key, same))
    return found


@pytest.fixture(scope="module")
def the_same(tmp_path_factory) -> dict[tuple[str, str], bool]:
    (found,) = run_ranks(1, compare, tmp_path_factory.mktemp("routers"))
    return {(router, key): same for router, key, same in found}


def said(*overrides: str) -> list[str]:
    return list(keys_are_read(derived(*overrides)))


@pytest.mark.parametrize("router, key", PAIRS)
def test_a_router_computes_the_same_with_any_value_of_what_it_does_not_read_and_of_nothing_else(
    router, key, the_same
):
    assert the_same[router, key] == (key in ROUTERS[router])


@pytest.mark.parametrize("router, key", PAIRS)
def test_a_key_is_refused_exactly_where_the_router_does_not_read_it(router, key):
    before, after = two_ways(router, key)
    assert not any(text.startswith(f"{key} = ") for text in said(*before))
    assert any(text.startswith(f"{key} = ") for text in said(*after)) == (key in ROUTERS[router])


@pytest.mark.parametrize("row", UNREAD, ids=lambda row: row.why)
def test_what_asks_for_nothing_is_the_default_of_the_option_files_and_of_megatron_core(row):
    defaults = transformer_config_defaults()
    for key, nothing in row.keys.items():
        section, name = key.split(".")
        assert defaults[name] == nothing
        assert value_of(config_of("router=aux_loss"), key) == nothing
        base = OmegaConf.load(CONF / section / "_base.yaml")
        for path in (CONF / section).glob("*.yaml"):
            value = OmegaConf.merge(base, OmegaConf.load(path))[name]
            assert value == nothing or path.stem == "expert_bias", path


def test_the_message_names_the_value_the_reason_and_the_default():
    assert said("router=sinkhorn", "router.moe_router_pre_softmax=true") == [
        "router.moe_router_pre_softmax = true is not read with"
        " router.moe_router_load_balancing_type = sinkhorn; use false"
    ]


def test_of_two_reasons_the_first_is_said():
    words = ["router=sinkhorn", SIGMOID, "router.moe_router_pre_softmax=true"]
    assert [text.split(" = ")[0] for text in said(*words)] == [
        "router.moe_router_score_function", "router.moe_router_pre_softmax",
    ]  # fmt: skip


def test_under_sinkhorn_the_rate_of_a_bias_that_is_there_is_not_read_either():
    words = [
        "router=sinkhorn",
        "router.moe_router_enable_expert_bias=true",
        "router.moe_router_bias_update_rate=0.1",
    ]
    assert [text.split(" = ")[0].removeprefix("router.moe_router_") for text in said(*words)] == [
        "enable_expert_bias", "bias_update_rate",
    ]  # fmt: skip
