"""The work of transformers' own model, Mixtral or Qwen3-MoE: forward and backward, the same batch and weights.

Rule: transformers' public classes as they are, with the fastest settings it has for training unless the scenario names
another: PyTorch's attention, no cache, no router logits, gradients set to None between passes.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mixtrain.config.choices import Accelerator, Precision
from mixtrain.config.plan import Plan
from mixtrain.engine import weight_init
from mixtrain.interop.convert import hf_config
from mixtrain.interop.convert.weights import to_hugging_face
from mixtrain.proof.bench.batch import microbatches
from mixtrain.proof.bench.memory import Memory
from mixtrain.proof.bench.work import Work

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def forward_backward(plan: Plan, chosen: dict[str, str], memory: Memory) -> Work:
    """Each repeat takes the whole global batch in the plan's microbatches; `chosen`: values of its config."""
    trainer = plan.config.trainer
    device = torch.device("cuda" if trainer.accelerator is Accelerator.gpu else "cpu")
    memory.begin()
    model = built(plan, chosen, device)
    batch = [
        {"input_ids": part["tokens"].to(device), "shift_labels": part["labels"].to(device)}
        for part in microbatches(plan)
    ]

    def once() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        losses = []
        for part in batch:
            # `labels` asks for a loss, `shift_labels` says that they are shifted already
            loss = model(**part, labels=part["shift_labels"], use_cache=False).loss / len(batch)
            loss.backward()
            losses.append(loss.detach())
        return {"sum": torch.stack(losses).sum().item(), "tokens": 1}

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return Work(once, plan.tokens_per_step, wait, lambda: gradient_norm(model))


def built(plan: Plan, chosen: dict[str, str], device: torch.device) -> PreTrainedModel:
    """The model with the weights that the plan's seed gives ours."""
    values = hf_config.to_hugging_face(plan.config) | {"attn_implementation": "sdpa"} | chosen
    dtype = DTYPES[plan.config.trainer.precision]
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=dtype)
    weights = to_hugging_face(plan.config, weight_init.initial_tensors(plan, dtype), "fused")
    model.load_state_dict(weights, strict=plan.config.model.untie_embeddings_and_output_weights)
    return model.train()


def gradient_norm(model: torch.nn.Module) -> float:
    return (
        sum(parameter.grad.double().pow(2).sum().item() for parameter in model.parameters()) ** 0.5
    )
