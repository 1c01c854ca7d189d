"""A Mixtral here is a Mixtral there: Hugging Face's weights give the same logits, LM loss and
gradients here.

fp32, transformers' MixtralForCausalLM against Megatron-Core's model on real gloo ranks. Both add up
a hundred terms, each in its order, layer upon layer: that makes differences of some 1e-6
(docs/hugging_face.md), and the limits leave a factor of twenty for another machine. A fault of the
kind that is looked for here changes logits by 1 and more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composing import config_of, plan_of
from megatron.core import parallel_state
from rank_workers import run_ranks
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from mixtrain.config.families import FAMILIES
from mixtrain.config.plan import Plan, resolve
from mixtrain.config.schema import Config
from mixtrain.engine import model, optimizer, process_groups, shards
from mixtrain.interop.convert import hf_config, tensor_mapping
from mixtrain.interop.convert.weights import to_hugging_face, to_megatron
from mixtrain.system.rank_identity import Identity
from mixtrain.training import loop
from mixtrain.training.signals import StopRequest

# a gradient's: of its largest entry
LIMITS = {"outputs": 1e-4, "logits": 1e-4, "loss": 1e-5, "gradient": 1e-4}
SEQUENCES = 4
LENGTH = 32
SMALL = [
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.moe_ffn_hidden_size=96",
    "model.vocab_size=256",
    "router=none",
    "data=mock",
    f"data.seq_length={LENGTH}",
    "trainer.micro_batch_size=1",
    f"trainer.global_batch_size={SEQUENCES}",
    "trainer.timeout_minutes=1",
]
FOUR_TO_ONE: list[str] = []
SHAPES = {
    "4 query heads a group, 8 experts, top-2": FOUR_TO_ONE,
    "1 query head a group, large heads, 4 experts, top-3": [
        "model.num_query_groups=8",
        "model.kv_channels=24",
        "model.num_moe_experts=4",
        "model.moe_router_topk=3",
    ],
    "1 group, tied embeddings, rotary base 10000": [
        "model.num_query_groups=1",
        "model.untie_embeddings_and_output_weights=false",
        "model.rotary_base=10000",
    ],
}
# The parts of both models whose outputs are compared, in the order of the forward pass, and the
# weights of each.
PARTS = [
    (r"model.embed_tokens", "embedding", r"model.embed_tokens"),
    (
        r"model.layers.{}.self_attn",
        "decoder.layers.{}.self_attention",
        r"model.layers.{}.(input_layernorm|self_attn)",
    ),
    (
        r"model.layers.{}.mlp.gate",
        "decoder.layers.{}.mlp.router",
        r"model.layers.{}.(post_|.*\.gate)",
    ),
    (r"model.layers.{}.mlp", "decoder.layers.{}.mlp", r"model.layers.{}.*experts"),
    (r"model.norm", "decoder.final_layernorm", r"model.norm"),
    (r"lm_head", "output_layer", r"lm_head"),
]


def parts(layers: int) -> list[tuple[str, str, str]]:
    """PARTS, with the layers' for every layer."""
    inner = [
        tuple(name.format(layer) for name in part) for layer in range(layers) for part in PARTS[1:4]
    ]
    return [PARTS[0], *inner, *PARTS[4:]]


def sequences() -> torch.Tensor:
    return torch.randint(
        0, 256, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1)
    )


def outputs_of(model: torch.nn.Module, names: list[str], into: dict[str, object]) -> None:
    """From now on `into` has what these modules last gave."""
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: into.__setitem__(name, output)
        )


def weights_over_experts(tokens: int, output: tuple) -> torch.Tensor:
    """Hugging Face's router output as [sequence, token, expert]: weights by expert."""
    logits, weights, chosen = output
    return torch.zeros_like(logits).scatter(1, chosen, weights).view(-1, tokens, logits.shape[1])


def margin(logits: torch.Tensor, topk: int) -> float:
    """How far the last chosen expert's logit is from the next one's, for the token where it is
    nearest.
    """
    best = logits.topk(topk + 1).values
    return (best[:, -2] - best[:, -1]).min().item()


def hugging_face(config: Config, folder: Path, values: dict) -> list[float]:
    """transformers' own model with random weights: its files, and in `reference.pt` what it makes
    of the sequences.

    Gives the smallest margin of a choice of experts in each layer.
    """
    torch.manual_seed(7)
    own = hf_config.to_hugging_face(config) | {"initializer_range": 0.1} | values
    there = MixtralForCausalLM(
        MixtralConfig(**own, attn_implementation="eager", experts_implementation="eager")
    )
    for name, parameter in there.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    there.save_pretrained(folder)
    found: dict[str, object] = {}
    names = [name for name, _, _ in parts(config.model.num_layers)]
    outputs_of(there, names, found)
    result = there(input_ids=sequences(), labels=sequences())  # it shifts the labels itself
    result.loss.backward()
    gradients = {name: parameter.grad for name, parameter in there.named_parameters()}
    margins = [
        margin(found[name][0], own["num_experts_per_tok"])
        for name in names
        if name.endswith("gate")
    ]
    for name in names:
        output = found[name]
        output = weights_over_experts(LENGTH + 1, output) if name.endswith("gate") else output
        output = output[0] if isinstance(output, tuple) else output
        found[name] = output[:, :LENGTH].detach()
    reference = {
        "loss": result.loss.item(),
        "logits": result.logits[:, :LENGTH].detach(),
        "outputs": found,
        # under the names of files, by transformers' own code
        "gradients": revert_weight_conversion(there, gradients),
    }
    torch.save(reference, folder / "reference.pt")
    return margins


def here_and_there(plan: Plan, config: Config, folder: Path, identity: Identity) -> dict:
    """What the plan's model on one rank makes of Hugging Face's weights, as differences from
    Hugging Face.

    `config` is that of the weights; `plan` may differ from it by a fault.
    """
    there = torch.load(folder / "reference.pt", weights_only=True)
    with process_groups.start(plan, identity) as rank:
        (chunk,) = model.build(plan, rank.device)
        shards.fill([chunk], to_megatron(config, load_file(folder / "model.safetensors")))
        chunk.eval()
        tokens = sequences()[:, :-1]
        labels = sequences()[:, 1:]
        positions = torch.arange(LENGTH).expand(SEQUENCES, -1)
        outputs = {}
        outputs_of(chunk, [name for _, name, _ in parts(plan.config.model.num_layers)], outputs)
        logits = chunk(tokens, positions, attention_mask=None)
        first = first_difference(there["outputs"], outputs, plan.config.model.num_layers)
        loss = chunk(tokens, positions, attention_mask=None, labels=labels).mean()
        loss.backward()
        with shards.substitute_parameters([chunk], lambda parameter: parameter.grad):
            gradients = to_hugging_face(config, shards.read(plan, [chunk]))
    assert set(gradients) == set(there["gradients"])
    # no expert was left without tokens
    assert all(largest(gradient) > 0 for gradient in there["gradients"].values())
    return {
        "logits": largest(logits - there["logits"]),
        "loss": abs(loss.item() - there["loss"]),
        "gradients": {
            name: largest(gradient - there["gradients"][name]) / largest(there["gradients"][name])
            for name, gradient in gradients.items()
        },
        "first": first,
    }


def first_difference(
    there: dict[str, torch.Tensor], here: dict[str, object], layers: int
) -> str | None:
    """The first part of the model, by the pattern of its weights' names, that gives something else
    here.
    """
    for name, ours, weights in parts(layers):
        output = here[ours][0] if isinstance(here[ours], tuple) else here[ours]
        # Megatron-Core puts the sequence first
        output = output.view(LENGTH, SEQUENCES, -1).transpose(0, 1)
        if not largest(output - there[name]) <= LIMITS["outputs"]:
            return weights
    return None


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()


def differences(found: dict) -> list[str]:
    """What is not the same, first of all the weights with which the forward passes part."""
    lines = []
    if found["first"] is not None:
        names = [name for name in found["gradients"] if re.match(found["first"], name)]
        lines.append(
            f"the forward passes part at {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        )
    lines += [
        f"{name}: {found[name]:.2g}"
        for name in ("logits", "loss")
        if not found[name] <= LIMITS[name]
    ]
    for name, difference in found["gradients"].items():
        if not difference <= LIMITS["gradient"]:
            lines.append(f"gradient of {name}: {difference:.2g} of its largest entry")
    return lines


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(configuration, folder with files) of Hugging Face's model of a shape, made once each."""
    known = {}

    def made(words: list[str], **values: object) -> tuple[Config, Path]:
        key = (*words, *values.items())
        if key not in known:
            config = resolve(config_of(*SMALL, *words))
            folder = tmp_path_factory.mktemp("there")
            (margins,) = run_ranks(1, lambda identity: hugging_face(config, folder, values), folder)
            assert min(margins) > 1e-4  # no choice that rounding could turn
            known[key] = config, folder
        return known[key]

    return made


def compare(reference: tuple[Config, Path], words: list[str], folder: Path) -> dict:
    plan = plan_of(*SMALL, "parallel.expert_model_parallel_size=1", *words)
    (found,) = run_ranks(1, lambda identity: here_and_there(plan, *reference, identity), folder)
    worst = max(found["gradients"], key=found["gradients"].get)
    print(
        f"logits {found['logits']:.1e}, loss {found['loss']:.1e}, gradient"
        f" {found['gradients'][worst]:.1e} ({worst})"
    )
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_the_gradient_of_every_weight_are_hugging_faces(shape, reference, tmp_path):
    assert differences(compare(reference(SHAPES[shape]), SHAPES[shape], tmp_path)) == []


@pytest.mark.parametrize("implementation", ["torch", "local"])
def test_so_they_are_where_experts_are_multiplied_one_by_one(implementation, reference, tmp_path):
    words = [f"model.transformer_impl={implementation}", "model.moe_grouped_gemm=false"]
    assert differences(compare(reference(FOUR_TO_ONE), words, tmp_path)) == []


ATTENTION = (
    "model.layers.0.input_layernorm.weight, model.layers.0.self_attn.q_proj.weight,"
    " model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj.weight ..."
)
ROUTER = (
    "model.layers.0.post_attention_layernorm.weight, model.layers.0.block_sparse_moe.gate.weight"
)
FAULTS = {
    "model.rotary_base=10000": ATTENTION,
    "model.extra.rotary_interleaved=true": ATTENTION,
    "model.layernorm_epsilon=1e-3": ATTENTION,
    "router.moe_router_pre_softmax=true": ROUTER,
    "router.moe_router_score_function=sigmoid": ROUTER,
    "router=sinkhorn": ROUTER,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_key_is_noticed_and_the_weights_named_that_it_belongs_to(
    fault, reference, tmp_path
):
    found = differences(compare(reference(FOUR_TO_ONE), [fault], tmp_path))
    assert found[0] == f"the forward passes part at {FAULTS[fault]}"
    assert found[1].startswith("logits: ")


def test_gate_and_up_swapped_are_noticed_and_named(reference, tmp_path, monkeypatch):
    there = reference(FOUR_TO_ONE)
    mixtral = FAMILIES["mixtral"]
    swapped = [
        row._replace(names=" ".join(row.names.split()[::-1])) if row.split == "gate_up" else row
        for row in mixtral.tensors
    ]
    monkeypatch.setitem(FAMILIES, "mixtral", replace(mixtral, tensors=swapped))
    found = differences(compare(there, FOUR_TO_ONE, tmp_path))
    expert = "model.layers.0.block_sparse_moe.experts.0"
    assert found[0].startswith(
        f"the forward passes part at {expert}.w3.weight, {expert}.w1.weight, "
    )


def test_qkv_not_cut_by_group_is_noticed_and_named(reference, tmp_path, monkeypatch):
    there = reference(FOUR_TO_ONE)
    monkeypatch.setitem(
        tensor_mapping.SPLITS, "qkv", lambda tensor, sizes: list(tensor.split([64, 16, 16]))
    )
    found = differences(compare(there, FOUR_TO_ONE, tmp_path))
    assert found[0] == f"the forward passes part at {ATTENTION}"


def test_top_1_is_another_model_there(reference, tmp_path):
    """It weighs a token's only expert by 1, Megatron-Core by its score: a softmax over one logit it
    refuses.
    """
    words = ["model.moe_router_topk=1", "router.moe_router_pre_softmax=true"]
    found = differences(compare(reference(FOUR_TO_ONE, num_experts_per_tok=1), words, tmp_path))
    assert found[0] == f"the forward passes part at {ROUTER}"


def loss_and_norm(plan: Plan, config: Config, folder: Path, identity: Identity) -> list[float]:
    """LM loss and gradient norm of one training step, from Hugging Face's weights, at the plan's
    layout.
    """
    with process_groups.start(plan, identity) as rank:
        chunks = model.build(plan, rank.device)
        shards.fill(chunks, to_megatron(config, load_file(folder / "model.safetensors")))
        training = optimizer.build(plan, chunks)
        loss, norm, _ = loop.train_step(
            plan, rank, training, [microbatches()], StopRequest(), 1, SEQUENCES
        )
    return [loss, norm]


def microbatches() -> Iterator[dict[str, torch.Tensor]]:
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    for tokens in sequences()[rank::size]:
        yield {
            "tokens": tokens[None, :-1],
            "labels": tokens[None, 1:],
            "loss_mask": torch.ones(1, LENGTH),
            "position_ids": torch.arange(LENGTH)[None],
        }


LAYOUTS = {
    "TP2 x EP2 x DP2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "PP2 x EP2": [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.num_layers_in_first_pipeline_stage=1",
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_four_ranks_computes_hugging_faces_loss_and_gradient_norm(
    layout, reference, tmp_path
):
    config, folder = reference(FOUR_TO_ONE)
    there = torch.load(folder / "reference.pt", weights_only=True)
    norm = (
        sum(gradient.double().pow(2).sum().item() for gradient in there["gradients"].values())
        ** 0.5
    )
    words = ["parallel.expert_model_parallel_size=2", "trainer.devices=4", *LAYOUTS[layout]]
    plan = plan_of(*SMALL, *words)
    for found in run_ranks(
        4, lambda identity: loss_and_norm(plan, config, folder, identity), tmp_path
    ):
        assert found == pytest.approx([there["loss"], norm], rel=1e-5)
