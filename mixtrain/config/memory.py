"""Parameters and bytes of a Mixtral-class model: pure arithmetic. No torch.

Rule: every count here is checked against the real model's tensors in tests/config/test_costs.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixtrain.config import pipeline_split
from mixtrain.config.choices import Precision, Sharding
from mixtrain.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from mixtrain.config.tensor_schema import layer_counts

GIB = 2**30
MOMENTS = {"adam": 2, "sgd": 1}  # fp32 tensors beside each parameter


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one transformer layer, by what divides them."""

    attention: int  # q, k, v and output projections: divided by TP
    replicated: int  # norms and router: divided by nothing
    shared_expert: int  # divided by TP
    expert: int  # one routed expert; a layer has num_moe_experts, divided by EP and ETP

    def total(self, experts: int) -> int:
        return self.attention + self.replicated + self.shared_expert + experts * self.expert


def layer_parameters(model: ModelConfig) -> LayerParameters:
    """Counts of one layer, from the tensors that config/tensor_schema.py lists."""
    return LayerParameters(
        attention=layer_counts(model, "tp", "self_attention."),
        replicated=layer_counts(model, ""),
        shared_expert=layer_counts(model, "tp", "mlp.shared_experts."),
        expert=layer_counts(model, "ep"),
    )


def total_parameters(model: ModelConfig, experts: int | None = None) -> int:
    """Parameters of the whole model; with `experts`, as if a layer had only so many (top-k gives the active ones)."""
    layer = layer_parameters(model).total(model.num_moe_experts if experts is None else experts)
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    return (
        model.num_layers * layer
        + matrices * model.vocab_size * model.hidden_size
        + model.hidden_size
    )


def active_parameters(model: ModelConfig) -> int:
    """Parameters that one token uses: top-k of the experts and everything else."""
    return total_parameters(model, experts=model.moe_router_topk)


def training_flops(model: ModelConfig, seq_length: int, causal: bool) -> float:
    """Floating-point operations of training on one token, forward and backward, nothing recomputed.

    6 for each weight that it is multiplied with (not the embedding, which is looked up). The two
    products of attention are counted for the half of the score matrix that is causal, or for all of
    it, as Megatron-LM's older count does.
    """
    matrices = layer_counts(model, "tp", axes=2) + layer_counts(model, "", axes=2)
    weights = matrices + model.moe_router_topk * layer_counts(model, "ep")
    scores = 2 * seq_length * model.num_attention_heads * model.kv_channels / (2 if causal else 1)
    return 6 * (model.num_layers * (weights + scores) + model.vocab_size * model.hidden_size)


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters on one rank of pipeline stage `stage`.

    The first stage has the embedding, the last the final norm and the output layer.
    """
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    layer = layer_parameters(model)
    layers = sum(pipeline_split.stages(parallel, model.num_layers)[stage])
    dense = layers * ((layer.attention + layer.shared_expert) // tp + layer.replicated)
    first = stage == 0
    last = stage == pp - 1
    matrices = first + last if model.untie_embeddings_and_output_weights else first or last
    dense += matrices * model.vocab_size * model.hidden_size // tp
    dense += model.hidden_size if last else 0
    experts = layers * model.num_moe_experts * layer.expert
    return dense, experts // (
        parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    )


def checkpoint_bytes(parameters: int, precision: Precision, optimizer: OptimizerConfig) -> int:
    """Bytes of a checkpoint: the weights as they are, and in fp32 those that are stepped, and the optimizer's state."""
    states = MOMENTS[optimizer.optimizer.name]
    return parameters * ((4 if precision is Precision.fp32 else 2) + 4 + 4 * states)


def bytes_per_parameter(
    precision: Precision, optimizer: OptimizerConfig, shard: int, sharding: Sharding | None = None
) -> float:
    """Training state of one parameter in bytes: weight, gradient and optimizer, each whole or a part of `shard`.

    16-bit training keeps an fp32 master copy beside Adam's two moments (12 bytes); fp32 training needs no copy (8).
    The distributed optimizer shards the optimizer's; Megatron-FSDP's `sharding` says whether gradients and weights too.
    """
    moments = MOMENTS[optimizer.optimizer.name]
    fp32 = precision is Precision.fp32
    weight, gradient = (4, 4) if fp32 else (2, 4 if optimizer.grad_reduce_in_fp32 else 2)
    state = 4 * (moments if fp32 else 1 + moments)
    return (
        weight / (shard if sharding is Sharding.optim_grads_params else 1)
        + gradient
        / (shard if sharding in (Sharding.optim_grads, Sharding.optim_grads_params) else 1)
        + state / (shard if sharding or optimizer.use_distributed_optimizer else 1)
    )
