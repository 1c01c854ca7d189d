"""Forward and backward of transformers' Mixtral or Qwen3-MoE on the same batch and weights.

Rule: uses transformers' public classes unchanged, with their fastest settings for training unless
the scenario names others: PyTorch's attention, no cache, no router logits, gradients set to None
between passes.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mixtrain.config.choices import Accelerator, Precision
from mixtrain.config.plan import Plan
from mixtrain.engine import weight_init
from mixtrain.interop.convert import hf_config
from mixtrain.interop.convert.weights import to_hugging_face
from mixtrain.proof.bench.work import Memory, Work, microbatches, norm_of

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def forward_backward(plan: Plan, config_overrides: dict[str, str], memory: Memory) -> Work:
    """Return the work: each repeat takes the whole global batch in the plan's microbatches."""
    is_gpu = plan.config.trainer.accelerator is Accelerator.gpu
    device = torch.device("cuda" if is_gpu else "cpu")
    memory.begin()
    model = build_model(plan, config_overrides, device)
    inputs = [
        {"input_ids": batch["tokens"].to(device), "shift_labels": batch["labels"].to(device)}
        for batch in microbatches(plan)
    ]

    def once() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        losses = []
        for tensors in inputs:
            # `labels` requests a loss; `shift_labels` are labels that are already shifted
            output = model(**tensors, labels=tensors["shift_labels"], use_cache=False)
            loss = output.loss / len(inputs)
            loss.backward()
            losses.append(loss.detach())
        return {"sum": torch.stack(losses).sum().item(), "tokens": 1}

    wait = torch.cuda.synchronize if is_gpu else lambda: None

    return Work(
        once, plan.tokens_per_step, wait, lambda: norm_of(each.grad for each in model.parameters())
    )


def build_model(
    plan: Plan, config_overrides: dict[str, str], device: torch.device
) -> PreTrainedModel:
    """Build the model with the same weights as mixtrain's model of the plan's seed."""
    values = hf_config.to_hugging_face(plan.config) | {"attn_implementation": "sdpa"}
    values |= config_overrides
    dtype = DTYPES[plan.config.trainer.precision]
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=dtype)
    weights = to_hugging_face(plan.config, weight_init.initial_tensors(plan, dtype), "fused")
    model.load_state_dict(weights, strict=plan.config.model.untie_embeddings_and_output_weights)
    return model.train()
