"""Generation gives transformers' greedy tokens, the same ones at every layout, and a pass costs new
tokens alone.

fp32 on real gloo ranks. Where two tokens are likely within 1e-6 rounding would choose; the fixture
sees that none are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composing import config_of, plan_of
from rank_workers import run_ranks
from safetensors.torch import load_file
from test_parity import TINY
from transformers import MixtralConfig, MixtralForCausalLM

from mixtrain.config.plan import Plan, resolve
from mixtrain.engine import model, process_groups, shards
from mixtrain.interop.convert import hf_config
from mixtrain.interop.convert.weights import to_megatron
from mixtrain.interop.generate.generator import Callbacks, Generator, Sequence, StopConditions
from mixtrain.interop.generate.request import Sampling
from mixtrain.system.rank_identity import Identity

SMALL = [*TINY, "router=none"]
NEW = 8
DRAWS = torch.Generator().manual_seed(3)
PROMPTS = [
    torch.randint(1, 256, (length,), generator=DRAWS).tolist() for length in (3, 11, 1, 7, 5)
]
SAMPLED = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=5)
EP2 = "parallel.expert_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
LAYOUTS = {
    "EP1": [],
    "EP2": [EP2],
    "TP2": TP2,
    "PP2": [PP2],
    "TP2 x EP2": [EP2, *TP2],
    "TP2 x EP2 x DP2": [EP2, *TP2, "trainer.devices=4"],
}


def plan_at(words: list[str]) -> Plan:
    return plan_of(*SMALL, "parallel=ep1", *words)


def hugging_face(folder: Path) -> dict:
    """transformers' greedy tokens of random weights, which it leaves in the folder, and the nearest
    two logits.
    """
    config = resolve(config_of(*SMALL))
    torch.manual_seed(7)
    own = hf_config.to_hugging_face(config) | {"initializer_range": 0.1}
    there = MixtralForCausalLM(
        MixtralConfig(**own, attn_implementation="eager", experts_implementation="eager")
    )
    there.save_pretrained(folder)
    tokens = []
    margin = 1.0
    for prompt in PROMPTS:
        done = there.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(done.sequences[0, len(prompt) :].tolist())
        best = torch.stack(done.logits).topk(2).values
        margin = min(margin, (best[..., 0] - best[..., 1]).min().item())
    return {"tokens": tokens, "margin": margin}


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """(the folder of Hugging Face's files, the greedy tokens after each prompt)."""
    folder = tmp_path_factory.mktemp("there")
    (found,) = run_ranks(1, lambda identity: hugging_face(folder), folder)
    assert found["margin"] > 1e-4 and len(set(sum(found["tokens"], []))) > 15
    return folder, found["tokens"]


class Rank:
    """A rank's model with Hugging Face's weights, or those of the seed, and what its layers were
    given.
    """

    def __init__(self, plan: Plan, here: process_groups.Ranks, folder: Path | None):
        (self.chunk,) = model.build(plan, here.device)
        if folder:
            weights = load_file(folder / "model.safetensors")
            shards.fill([self.chunk], to_megatron(resolve(config_of(*SMALL)), weights))
        self.device = here.device
        self.rows = []
        experts = shards.unwrap(self.chunk).decoder.layers[0].mlp
        experts.register_forward_pre_hook(
            lambda _, given: self.rows.append(given[0].shape[0] * given[0].shape[1])
        )

    def continued(
        self, prompts: list[list[int]], sampling: Sampling, limits: StopConditions
    ) -> list[list]:
        batch = [Sequence(number, prompt) for number, prompt in enumerate(prompts)]
        Generator(self.chunk, self.device, sampling, limits, Callbacks()).generate(batch)
        return [[each.tokens, each.reason] for each in batch]


def until(length: int, eod: int | None = None, stops=lambda tokens: False) -> StopConditions:
    return StopConditions(length, {eod}, stops)


def on_layout(
    plan: Plan, identity: Identity, folder: Path | None, samplings: list[Sampling]
) -> list:
    with process_groups.start(plan, identity) as here:
        found = []
        for sampling in samplings:  # a model each: a second cache would be put on the first
            found.append(Rank(plan, here, folder).continued(PROMPTS, sampling, until(NEW)))
        return found


@pytest.fixture(scope="module")
def sampled(there, tmp_path_factory) -> list[list]:
    """What one rank draws."""
    folder = tmp_path_factory.mktemp("sampled")
    ((found,),) = run_ranks(
        1, lambda identity: on_layout(plan_at([]), identity, there[0], [SAMPLED]), folder
    )
    assert [tokens for tokens, _ in found] != there[1]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_are_transformers_and_sampled_ones_those_of_one_rank(
    layout, there, sampled, tmp_path
):
    plan = plan_at(LAYOUTS[layout])
    folder, greedy = there
    for found in run_ranks(
        plan.world_size,
        lambda identity: on_layout(plan, identity, folder, [Sampling(), SAMPLED]),
        tmp_path,
    ):
        assert found[0] == [[tokens, "length"] for tokens in greedy]
        assert found[1] == sampled


def test_a_pass_takes_the_new_tokens_alone_and_none_of_a_text_that_has_ended(there, tmp_path):
    folder, greedy = there
    ends = [0, 1, 2, 3, 4]  # the place of the token at which each prompt's text ends
    last = [tokens[place] for tokens, place in zip(greedy, ends, strict=True)]

    def one_rank(identity: Identity) -> list:
        with process_groups.start(plan_at([]), identity) as here:
            rank = Rank(plan_at([]), here, folder)
            stops = [tokens[: place + 1] for tokens, place in zip(greedy, ends, strict=True)]
            found = rank.continued(
                PROMPTS, Sampling(), until(NEW, stops=lambda tokens: tokens in stops)
            )
            return [found, rank.rows]

    ((found, rows),) = run_ranks(1, one_rank, tmp_path)
    assert rows == [sum(map(len, PROMPTS)), 4, 3, 2, 1]
    assert [tokens[-1] for tokens, _ in found] == last and {reason for _, reason in found} == {
        "stop"
    }
    assert [tokens for tokens, _ in found] == [
        tokens[: place + 1] for tokens, place in zip(greedy, ends, strict=True)
    ]


def test_at_the_token_that_ends_a_document_a_text_ends_and_the_replicas_beside_it_go_on(
    there, tmp_path
):
    folder, greedy = there
    eod = greedy[0][2]
    want = [tokens[: tokens.index(eod) + 1] if eod in tokens else tokens for tokens in greedy]
    assert 1 <= sum(eod in tokens for tokens in greedy) < len(greedy)
    plan = plan_at([EP2])  # two replicas: of three prompts, and of two

    def one_rank(identity: Identity) -> list:
        with process_groups.start(plan, identity) as here:
            return Rank(plan, here, folder).continued(PROMPTS, Sampling(), until(NEW, eod))

    for found in run_ranks(2, one_rank, tmp_path):
        assert [tokens for tokens, _ in found] == want
        assert [reason for _, reason in found] == [
            "eod" if eod in tokens else "length" for tokens in greedy
        ]


def test_a_text_does_not_depend_on_the_prompts_beside_it_and_a_replica_may_have_none(
    there, sampled, tmp_path
):
    plan = plan_at([EP2])

    def one_rank(identity: Identity) -> list:
        with process_groups.start(plan, identity) as here:
            return Rank(plan, here, there[0]).continued(PROMPTS[:1], SAMPLED, until(NEW))

    for found in run_ranks(2, one_rank, tmp_path):
        assert found == sampled[:1]


def test_whoever_is_asked_to_stop_stops_all_ranks_after_that_token(there, tmp_path):
    plan = plan_at([EP2])

    def one_rank(identity: Identity) -> list:
        with process_groups.start(plan, identity) as here:
            passes: list[int] = []
            watch = Callbacks(
                lambda: identity.rank == 1 and len(passes) == 2,
                lambda tokens, _: passes.append(tokens),
            )
            batch = [Sequence(number, prompt) for number, prompt in enumerate(PROMPTS)]
            rank = Rank(plan, here, there[0])
            stopping = Generator(rank.chunk, here.device, Sampling(), until(NEW), watch).generate(
                batch
            )
            return [stopping, passes, [[each.tokens, each.reason] for each in batch]]

    for stopping, passes, found in run_ranks(2, one_rank, tmp_path):
        assert stopping and passes == [5, 5, 5]  # tokens of both replicas
        assert found == [[tokens[:3], "interrupted"] for tokens in there[1]]


# Routers and parts that Mixtral has not: there the model without a cache, on one rank, is the
# reference.
ETP2 = [*TP2, "parallel.expert_tensor_parallel_size=2"]
OTHERS = {
    "sinkhorn, on PP2": ["router=sinkhorn"],
    "balanced, on PP2": ["router=balanced"],
    "one norm over the queries of all heads, on ETP2": [
        "model.qk_layernorm=true",
        "model.qk_layernorm_over=projection",
    ],
    "biases of queries, keys and values, a gated shared expert, on ETP2": [
        "model.add_qkv_bias=true",
        "model.moe_shared_expert_intermediate_size=64",
        "model.moe_shared_expert_gate=true",
    ],
    "sigmoid, expert bias, groups, a shared expert, norms of queries and keys, on ETP2": [
        "router.moe_router_score_function=sigmoid",
        "router.moe_router_enable_expert_bias=true",
        "router.moe_router_num_groups=4",
        "router.moe_router_group_topk=2",
        "model.moe_shared_expert_intermediate_size=64",
        "model.qk_layernorm=true",
    ],
    "pre-softmax, one expert, a loop over experts, tied embeddings, heads that share no key, on"
    " TP2 x EP2": [
        "router.moe_router_pre_softmax=true",
        "model.moe_router_topk=1",
        "model.moe_grouped_gemm=false",
        "model.untie_embeddings_and_output_weights=false",
        "model.num_query_groups=4",
    ],
}


@pytest.mark.parametrize("other", OTHERS)
def test_with_a_cache_each_model_gives_what_it_gives_without(other, tmp_path):
    words = [*OTHERS[other], "model.init_method_std=0.1"]
    layout = {"ETP2": ETP2, **LAYOUTS}[other.split(", on ")[1]]
    here_plan = plan_at(words)
    there_plan = plan_at([*words, *layout])

    @torch.no_grad()
    def without(identity: Identity) -> list[list[int]]:
        with process_groups.start(here_plan, identity) as here:
            (chunk,) = model.build(here_plan, here.device)
            chunk.eval()
            texts = [list(prompt) for prompt in PROMPTS]
            for text in texts:
                for _ in range(NEW):
                    positions = torch.arange(len(text))[None]
                    text.append(
                        int(
                            chunk(torch.tensor([text]), positions, attention_mask=None)[
                                0, -1
                            ].argmax()
                        )
                    )
            return [text[-NEW:] for text in texts]

    (want,) = run_ranks(1, without, tmp_path / "without")
    assert len(set(sum(want, []))) > 3
    ((found,), *_) = run_ranks(
        2, lambda identity: on_layout(there_plan, identity, None, [Sampling()]), tmp_path / "with"
    )
    assert [tokens for tokens, _ in found] == want
