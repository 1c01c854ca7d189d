"""Compare a checkpoint with a Hugging Face model by running both, layer by layer.

Rule: no tensor is compared with its own conversion back. Each side continues from its own hidden
states, as in a normal forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from mixtrain.checkpoint.tensor_reader import TensorReader
from mixtrain.config import tensor_schema
from mixtrain.config.schema import Config
from mixtrain.engine.process_groups import Ranks
from mixtrain.interop.convert.reference_models import HuggingFaceLayers, MegatronLayers

# Of a token's largest entry. In fp32, rounding over some thousand terms makes 1e-6, a fault 1e-2 or
# more. bf16 has 8 bits: only the cosine is compared.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: None}
MIN_COSINE = 0.999  # of the logits


@dataclass
class LayerDifference:
    """The difference of the hidden states after a layer."""

    number: int
    largest: float  # absolute
    # the largest of any token, divided by the token's largest entry: some tokens of real models
    # have huge entries
    relative: float
    cosine: float
    rerouted: int  # tokens that go to different experts


@dataclass
class ModelDifference:
    """The result of a comparison; without `problems`, the models are the same."""

    tokens: int
    dtype: torch.dtype
    layers: list[LayerDifference] = field(default_factory=list)
    logits_largest: float = 0.0
    logits_relative: float = 0.0
    logits_cosine: float = 0.0
    # Kullback-Leibler divergence of Megatron-Core's next-token distribution from Hugging Face's, in
    # nats, mean over tokens
    divergence: float = 0.0
    problems: list[str] = field(default_factory=list)  # differences beyond the tolerances


def random_tokens(vocab_size: int, sequences: int, length: int) -> torch.Tensor:
    """Return [sequences, length] token ids, the same in every call."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(0, vocab_size, (sequences, length), generator=generator)


def compare(
    hugging_face: HuggingFaceLayers,
    megatron: MegatronLayers,
    num_layers: int,
    tokens: torch.Tensor,
) -> Iterator[ModelDifference]:
    """Yield the same ModelDifference after each layer and, complete, after the logits."""
    result = ModelDifference(tokens.numel(), hugging_face.dtype)
    tolerance = TOLERANCES[hugging_face.dtype]
    theirs = hugging_face.embed(tokens)
    ours = megatron.embed(tokens)
    for number in range(num_layers):
        their_output = hugging_face.run_layer(number, theirs)
        our_output = megatron.run_layer(number, ours)
        theirs = their_output.hidden
        ours = our_output.hidden
        rerouted = int((their_output.routing != our_output.routing).any(dim=1).sum())
        layer = LayerDifference(number, *_difference(theirs, ours), rerouted)
        result.layers.append(layer)
        if tolerance and not layer.relative <= tolerance:  # NaN is a problem too
            result.problems.append(
                f"after layer {number} the hidden states are {layer.relative:.1e} of a token's"
                f" largest entry apart; the limit is {tolerance:.0e}"
            )
        yield result
    theirs = hugging_face.logits(theirs)
    ours = megatron.logits(ours)[..., : theirs.shape[-1]]  # without padding of the vocabulary
    result.logits_largest, result.logits_relative, result.logits_cosine = _difference(theirs, ours)
    result.divergence = _kl_divergence(theirs, ours)
    if tolerance and not result.logits_relative <= tolerance:
        result.problems.append(
            f"the logits are {result.logits_relative:.1e} of a token's largest entry apart; the"
            f" limit is {tolerance:.0e}"
        )
    if not result.logits_cosine >= MIN_COSINE:
        result.problems.append(
            f"the cosine of the logits is {result.logits_cosine:.6f}; the limit is {MIN_COSINE}"
        )
    yield result


def _difference(theirs: torch.Tensor, ours: torch.Tensor) -> tuple[float, float, float]:
    """Return (largest, relative, cosine) as in LayerDifference; the last axis is a token's."""
    theirs = theirs.double()
    ours = ours.double()
    by_token = (theirs - ours).abs().amax(-1)
    largest_entries = theirs.abs().amax(-1).clamp_min(1e-30)
    cosine = torch.nn.functional.cosine_similarity(theirs.flatten(), ours.flatten(), dim=0).item()
    return by_token.max().item(), (by_token / largest_entries).max().item(), cosine


def _kl_divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    theirs = theirs.double().log_softmax(-1)
    ours = ours.double().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


# Damage on purpose: mistakes that converters have made, in a copy of the tensors or in the
# configuration. The comparison must detect each.
FC1, FC2 = (
    tensor_schema.LAYER + f"mlp.experts.experts.linear_fc{number}.weight" for number in (1, 2)
)
QKV = tensor_schema.LAYER + "self_attention.linear_qkv.weight"


def swap_gate_and_up(config: Config, key: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if key == FC1 else tensor


def transpose_down_proj(config: Config, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of the transposed matrix in the shape of the matrix."""
    return tensor.t().reshape(tensor.shape) if key == FC2 else tensor


def rotate_query_heads(config: Config, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Move each query head to the place of the next, across all groups."""
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


def toggle_pre_softmax(config: Config) -> Config:
    """Apply the softmax before the choice of experts instead of after it, or the reverse."""
    pre_softmax = not config.router.moe_router_pre_softmax
    return replace(config, router=replace(config.router, moe_router_pre_softmax=pre_softmax))


TensorDamage = Callable[[Config, str, torch.Tensor], torch.Tensor]
TENSOR_DAMAGES: dict[str, TensorDamage] = {
    "swap gate and up": swap_gate_and_up,
    "transpose down_proj": transpose_down_proj,
    "rotate q heads": rotate_query_heads,
}
CONFIG_DAMAGES = {"wrong RoPE base": wrong_rope_base, "pre-softmax": toggle_pre_softmax}
PERMUTE_EXPERTS = "permute two experts"  # needs the tensor of another expert
DAMAGES = (
    "swap gate and up",
    "transpose down_proj",
    PERMUTE_EXPERTS,
    "rotate q heads",
    *CONFIG_DAMAGES,
)


def damaged_megatron(
    name: str, config: Config, parts: TensorReader, ranks: Ranks
) -> MegatronLayers:
    """Return the Megatron-Core model with one of DAMAGES."""
    if damage_config := CONFIG_DAMAGES.get(name):
        return MegatronLayers(damage_config(config), parts, ranks)

    def damage(key: str, numbers: tuple[int, ...], tensor: torch.Tensor) -> torch.Tensor:
        if name != PERMUTE_EXPERTS:
            return TENSOR_DAMAGES[name](config, key, tensor)
        if len(numbers) < 2 or numbers[1] > 1:
            return tensor
        layer, expert = numbers
        return parts.at(key, (layer, 1 - expert))  # swap experts 0 and 1, not the router's rows

    return MegatronLayers(config, parts, ranks, damage)
