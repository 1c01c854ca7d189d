"""Small models of transformers on the disk, read without the code that is tested."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=256,
    head_dim=16,
    max_position_embeddings=512,
    num_experts_per_tok=2,
    rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
)
QWEN3 = dict(moe_intermediate_size=48, num_experts=8, intermediate_size=96)
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, dict(intermediate_size=96, num_local_experts=4)),
    "tied mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        dict(intermediate_size=96, num_local_experts=4, tie_word_embeddings=True),
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN3 | dict(norm_topk_prob=True)),
    "qwen3_moe, not normalised": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        QWEN3 | dict(norm_topk_prob=False),
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig,
        dict(
            intermediate_size=48,
            num_experts=8,
            head_dim=8,
            norm_topk_prob=False,
            pad_token_id=None,  # its row of the embedding would be zero, without a gradient
        ),
    ),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        QWEN3 | dict(shared_expert_intermediate_size=80, norm_topk_prob=False),
    ),
}


def saved(
    kind: str,
    folder: Path,
    fused: bool = False,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
) -> Path:
    """A model with random weights, norms too, as transformers saves it; always the same one of a
    kind.
    """
    model_class, config_class, values = MODELS[kind]
    torch.manual_seed(3)
    model = model_class(config_class(**SIZES | values, initializer_range=0.1)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size=shard)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of all safetensors files of a directory."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def unequal(a: Path, b: Path) -> list[str]:
    """The names of tensors that differ in a bit in two directories, or are in one alone."""
    here = tensors_of(a)
    there = tensors_of(b)
    different = [
        name
        for name in here.keys() & there.keys()
        if here[name].dtype != there[name].dtype
        or here[name].shape != there[name].shape
        or not torch.equal(here[name].view(torch.uint8), there[name].view(torch.uint8))
    ]
    return sorted(here.keys() ^ there.keys()) + different


def copied(folder: Path, target: Path) -> Path:
    """A copy of a directory's files, to be damaged."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
