"""Parameters and bytes of a Mixtral-class model, by arithmetic. No torch.

Rule: tests/config/test_costs.py compares every count with the tensors of the real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixtrain.config import pipeline_split
from mixtrain.config.choices import Precision, Sharding
from mixtrain.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from mixtrain.config.tensor_schema import layer_counts

GIB = 2**30
MOMENTS = {"adam": 2, "sgd": 1}  # fp32 optimizer tensors per parameter


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one transformer layer, by the sizes that divide them."""

    attention: int  # q, k, v and output projections: divided by TP
    replicated: int  # norms and router: not divided
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
    """Count the model's parameters; `experts` replaces the experts of a layer (top-k: active)."""
    layer = layer_parameters(model).total(model.num_moe_experts if experts is None else experts)
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    return (
        model.num_layers * layer
        + matrices * model.vocab_size * model.hidden_size
        + model.hidden_size
    )


def active_parameters(model: ModelConfig) -> int:
    """Count the parameters that one token uses: top-k experts and everything else."""
    return total_parameters(model, experts=model.moe_router_topk)


def training_flops(model: ModelConfig, seq_length: int, causal: bool) -> float:
    """Return the FLOPs of training on one token, forward and backward, without recompute.

    6 for each weight in a matrix product (the embedding is a lookup). causal: count half of the
    score matrix in the two attention products; else all of it, as Megatron-LM's older count does.
    """
    matrices = layer_counts(model, "tp", axes=2) + layer_counts(model, "", axes=2)
    weights = matrices + model.moe_router_topk * layer_counts(model, "ep")
    scores = 2 * seq_length * model.num_attention_heads * model.kv_channels / (2 if causal else 1)
    return 6 * (model.num_layers * (weights + scores) + model.vocab_size * model.hidden_size)


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """Return (dense, expert) parameters on a rank of pipeline stage `stage`.

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
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return dense, experts // ranks


def checkpoint_bytes(parameters: int, precision: Precision, optimizer: OptimizerConfig) -> int:
    """Return the bytes of a checkpoint: weights, fp32 master weights and optimizer state."""
    states = MOMENTS[optimizer.optimizer.name]
    return parameters * ((4 if precision is Precision.fp32 else 2) + 4 + 4 * states)


def bytes_per_parameter(
    precision: Precision, optimizer: OptimizerConfig, shard: int, sharding: Sharding | None = None
) -> float:
    """Return the bytes of weight, gradient and optimizer state per parameter on a rank.

    16-bit training has an fp32 master weight and Adam's two moments (12 bytes), fp32 training only
    the moments (8). The distributed optimizer shards the state over `shard` ranks; `sharding` of
    Megatron-FSDP says whether gradients and weights are sharded, too.
    """
    moments = MOMENTS[optimizer.optimizer.name]
    fp32 = precision is Precision.fp32
    weight, gradient = (4, 4) if fp32 else (2, 4 if optimizer.grad_reduce_in_fp32 else 2)
    state = 4 * (moments if fp32 else 1 + moments)
    shards_weights = sharding is Sharding.optim_grads_params
    shards_gradients = shards_weights or sharding is Sharding.optim_grads
    shards_state = sharding or optimizer.use_distributed_optimizer
    return (
        weight / (shard if shards_weights else 1)
        + gradient / (shard if shards_gradients else 1)
        + state / (shard if shards_state else 1)
    )
