"""The proof that a checkpoint is the model of Hugging Face's files: both compute the same, layer by layer.

Rule: no tensor is compared with its own conversion back. Each side goes on from its own hidden states, as it would
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.schema import Config
from mixtrain.interop.convert.reference_models import HuggingFaceLayers, MegatronLayers

# fp32: rounding over some thousand terms makes 1e-6 of the largest entry; a fault makes 1e-2 and
# more. bf16 has 8 bits.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: None}
COSINE = 0.999


@dataclass
class Layer:
    """A layer's row: how far the hidden states after it are apart, and for how many tokens the experts are others."""

    number: int
    largest: float  # of the differences
    # the largest of a token's, of its largest entry: some tokens of real models have huge ones
    relative: float
    cosine: float  # of the two
    others: int  # tokens


@dataclass
class Verdict:
    """What was found. `problems` are the sentences about what is beyond the limits; none is the proof."""

    tokens: int
    dtype: torch.dtype
    layers: list[Layer] = field(default_factory=list)
    logits_largest: float = 0.0
    logits_relative: float = 0.0
    logits_cosine: float = 0.0  # of all logits
    # Kullback-Leibler, Hugging Face's next-token distribution from ours, in nats, the mean
    divergence: float = 0.0
    problems: list[str] = field(default_factory=list)


def random_tokens(vocabulary: int, sequences: int, length: int) -> torch.Tensor:
    return torch.randint(
        0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(1234)
    )


def compare(
    there: HuggingFaceLayers, here: MegatronLayers, layers: int, tokens: torch.Tensor
) -> Iterator[Verdict]:
    """The verdict so far, after each layer and at the end, after the logits."""
    verdict = Verdict(tokens.numel(), there.dtype)
    limit = LIMITS[there.dtype]
    theirs = there.embed(tokens)
    ours = here.embed(tokens)
    for number in range(layers):
        output = there.run_layer(number, theirs)
        own = here.run_layer(number, ours)
        theirs = output.hidden
        ours = own.hidden
        others = int((output.routing != own.routing).any(dim=1).sum())
        row = Layer(number, *_apart(theirs, ours), others)
        verdict.layers.append(row)
        if limit and not row.relative <= limit:
            verdict.problems.append(
                f"after layer {number} the hidden states are {row.relative:.1e} of a token's"
                f" largest entry apart; the limit is {limit:.0e}"
            )
        yield verdict
    theirs = there.logits(theirs)
    # without rows that were added to the vocabulary
    ours = here.logits(ours)[..., : theirs.shape[-1]]
    verdict.logits_largest, verdict.logits_relative, verdict.logits_cosine = _apart(theirs, ours)
    verdict.divergence = _divergence(theirs, ours)
    if limit and not verdict.logits_relative <= limit:
        verdict.problems.append(
            f"the logits are {verdict.logits_relative:.1e} of a token's largest entry apart; the"
            f" limit is {limit:.0e}"
        )
    if not verdict.logits_cosine >= COSINE:
        verdict.problems.append(
            f"the cosine of the logits is {verdict.logits_cosine:.6f}; the limit is {COSINE}"
        )
    yield verdict


def _apart(theirs: torch.Tensor, ours: torch.Tensor) -> tuple[float, float, float]:
    """(largest difference, largest of a token's largest entry, cosine) of two tensors whose last axis is a token's."""
    theirs = theirs.double()
    ours = ours.double()
    by_token = (theirs - ours).abs().amax(-1)
    entries = theirs.abs().amax(-1).clamp_min(1e-30)
    cosine = torch.nn.functional.cosine_similarity(theirs.flatten(), ours.flatten(), dim=0).item()
    return by_token.max().item(), (by_token / entries).max().item(), cosine


def _divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    theirs = theirs.double().log_softmax(-1)
    ours = ours.double().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


# What a converter may get wrong, each done on purpose to a copy of the tensors, or to the
# configuration.
FC1, FC2 = (
    tensor_schema.LAYER + f"mlp.experts.experts.linear_fc{number}.weight" for number in (1, 2)
)
QKV = tensor_schema.LAYER + "self_attention.linear_qkv.weight"


def swap_gate_and_up(
    config: Config, key: str, numbers: tuple[int, ...], tensor: torch.Tensor
) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if key == FC1 else tensor


def transpose_down_proj(
    config: Config, key: str, numbers: tuple[int, ...], tensor: torch.Tensor
) -> torch.Tensor:
    """The numbers of the transposed matrix in the shape of the matrix."""
    return tensor.t().reshape(tensor.shape) if key == FC2 else tensor


def rotate_query_heads(
    config: Config, key: str, numbers: tuple[int, ...], tensor: torch.Tensor
) -> torch.Tensor:
    """Each query head in the place of the next, over all groups."""
    if key != QKV:
        return tensor
    model = config.model
    by_group = tensor.clone().view(model.num_query_groups, -1, model.kv_channels, tensor.shape[-1])
    queries = by_group[:, :-2]
    queries.copy_(queries.flatten(0, 1).roll(1, 0).view(queries.shape))
    return by_group.view(tensor.shape)


def wrong_rope_base(config: Config) -> Config:
    base = 10_000 if config.model.rotary_base != 10_000 else 1_000_000
    return replace(config, model=replace(config.model, rotary_base=base))


def other_softmax(config: Config) -> Config:
    """The softmax over all experts before the choice, instead of over the chosen (or the other way round)."""
    router = config.router
    return replace(
        config, router=replace(router, moe_router_pre_softmax=not router.moe_router_pre_softmax)
    )


CHANGES = {
    "swap gate and up": swap_gate_and_up,
    "transpose down_proj": transpose_down_proj,
    "permute two experts": None,  # below: it needs another expert's tensor
    "rotate q heads": rotate_query_heads,
}
SETTINGS = {"wrong RoPE base": wrong_rope_base, "pre-softmax": other_softmax}
DAMAGES = (*CHANGES, *SETTINGS)


def damaged(name: str, config: Config, parts, here) -> MegatronLayers:
    """Megatron-Core's side with one damage."""
    if name in SETTINGS:
        return MegatronLayers(SETTINGS[name](config), parts, here)
    if change := CHANGES[name]:
        return MegatronLayers(config, parts, here, lambda *tensor: change(config, *tensor))

    def exchanged(key: str, numbers: tuple[int, ...], tensor: torch.Tensor) -> torch.Tensor:
        """Experts 0 and 1 in each other's place; the router's rows stay."""
        other = {0: 1, 1: 0}.get(numbers[1]) if len(numbers) == 2 else None
        return tensor if other is None else parts.at(key, (numbers[0], other))

    return MegatronLayers(config, parts, here, exchanged)
