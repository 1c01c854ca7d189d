"""Each family that has layers of its own: transformers' logits, loss and gradients, and training at
several layouts. Mixtral's are in test_hugging_face.py.
"""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import hf_models
import pytest
import torch
from composing import plan_of
from rank_workers import run_ranks
from transformers.core_model_loading import revert_weight_conversion

from mixtrain.checkpoint import load
from mixtrain.config.families import FAMILIES
from mixtrain.config.key_effects import show, value_of
from mixtrain.engine import model, optimizer, process_groups, shards
from mixtrain.interop.convert import checkpoint_config, to_hf, to_megatron
from mixtrain.interop.convert.weights import to_hugging_face
from mixtrain.training import loop
from mixtrain.training.signals import StopRequest

KINDS = ["olmoe", "qwen2_moe"]
LENGTH = 32
LAYOUTS = {
    "EP2": ["parallel=ep2"],
    "TP2": [
        "parallel=ep1",
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
    ],
    "PP2": ["parallel=ep1", "parallel.pipeline_model_parallel_size=2", "model.num_layers=4"],
}


def test_every_family_is_compared_with_transformers():
    assert {"mixtral", "qwen3_moe", *KINDS} == FAMILIES.keys()


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """(kind, a model of Hugging Face, its checkpoint)."""
    folder = tmp_path_factory.mktemp(request.param)
    hf_dir = hf_models.saved(request.param, folder / "there")
    to_megatron.convert(hf_dir, folder / "megatron")
    return request.param, hf_dir, folder / "megatron"


def plan_for(checkpoint: Path, *overrides: str):
    config = checkpoint_config.config_of(checkpoint / "release")
    keys = [f"model.{key}" for key in vars(config.model)] + [
        "router.moe_router_pre_softmax",
        "router.moe_router_score_function",
    ]
    own = [f"{key}={show(value_of(config, key))}" for key in keys if key != "model.extra"]
    return plan_of(
        "data=mock",
        *own,
        f"data.seq_length={LENGTH}",
        f"checkpoint.load_weights={checkpoint}",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2",
        "trainer.max_steps=3",
        "optimizer.lr_warmup_steps=0",
        "optimizer.lr=0.0005",  # no choice of an expert comes near a tie
        *overrides,
    )


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def test_logits_loss_and_every_gradient_are_those_of_transformers(pair, tmp_path):
    kind, hf_dir, checkpoint = pair
    model_class = hf_models.MODELS[kind][0]
    theirs = model_class.from_pretrained(hf_dir, attn_implementation="eager")
    result = theirs(input_ids=tokens(), labels=tokens())
    result.loss.backward()
    gradients = revert_weight_conversion(
        theirs, {name: parameter.grad for name, parameter in theirs.named_parameters()}
    )
    plan = plan_for(checkpoint, "parallel=ep1", "router=none", "router.moe_router_pre_softmax=true")

    def ours(identity) -> None:
        with process_groups.start(plan, identity) as ranks:
            training = optimizer.build(plan, model.build(plan, ranks.device))
            load.load_weights(plan, ranks, training, checkpoint / "release", lambda _: None)
            training.chunks[0].zero_grad_buffer()
            chunk = shards.unwrap(training.chunks[0]).eval()
            positions = torch.arange(LENGTH).expand(4, -1)
            logits = chunk(tokens()[:, :-1], positions, attention_mask=None)
            labels = tokens()[:, 1:]
            loss = chunk(tokens()[:, :-1], positions, attention_mask=None, labels=labels).mean()
            loss.backward()
            with shards.substitute_parameters([chunk], attrgetter("main_grad")):
                wholes = shards.read(plan, [chunk])
            own = to_hugging_face(plan.config, wholes)
            torch.save((logits.detach(), loss.item(), own), tmp_path / "ours.pt")

    run_ranks(1, ours, tmp_path / "rank")
    logits, loss, own = torch.load(tmp_path / "ours.pt", weights_only=True)
    torch.testing.assert_close(logits, result.logits[:, :-1], rtol=0, atol=2e-5)
    assert loss == pytest.approx(result.loss.item(), rel=1e-6)
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        largest = gradients[name].abs().max()
        assert largest > 0, name
        assert (gradient - gradients[name]).abs().max() <= 1e-5 * largest, name


def losses(checkpoint: Path, folder: Path, *overrides: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three steps from the converted weights."""
    plan = plan_for(checkpoint, "router.moe_router_pre_softmax=true", *overrides)

    def train(identity) -> list[tuple[float, float]]:
        with process_groups.start(plan, identity) as ranks:
            training = optimizer.build(plan, model.build(plan, ranks.device))
            if "model.num_layers=4" not in overrides:
                load.load_weights(plan, ranks, training, checkpoint / "release", lambda _: None)
            stream = [microbatches(plan) for _ in training.chunks]
            return [
                loop.train_step(plan, ranks, training, stream, StopRequest(), step, 4)[:2]
                for step in (1, 2, 3)
            ]

    return run_ranks(plan.world_size, train, folder)[-1]


def microbatches(plan):
    from megatron.core import parallel_state

    ranks = parallel_state.get_data_parallel_world_size()
    own = tokens().chunk(2 * ranks // ranks)  # two microbatches of two sequences
    first = parallel_state.get_data_parallel_rank()
    positions = torch.arange(LENGTH).expand(2, -1)
    for _ in range(3):
        for rows in own[first::ranks]:
            yield {
                "tokens": rows[:, :-1],
                "labels": rows[:, 1:],
                "loss_mask": torch.ones(2, LENGTH),
                "position_ids": positions,
            }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_are_the_same_at_every_layout(pair, layout, tmp_path):
    _, _, checkpoint = pair
    shape = [word for word in LAYOUTS[layout] if word.startswith("model.")]
    alone = losses(checkpoint, tmp_path / "alone", "parallel=ep1", "router=none", *shape)
    split = losses(checkpoint, tmp_path / "split", "router=none", *LAYOUTS[layout])
    assert split[0] == pytest.approx(alone[0], rel=1e-5)
    assert split[2] == pytest.approx(alone[2], rel=1e-4)
    assert alone[2][0] < alone[0][0]


def test_what_was_converted_comes_back_bit_for_bit(pair, tmp_path):
    _, hf_dir, checkpoint = pair
    to_hf.convert(checkpoint, tmp_path / "back")
    assert hf_models.unequal(hf_dir, tmp_path / "back") == []
