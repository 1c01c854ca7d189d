"""Router metrics of a step, the same on every rank: load per expert, balancing loss, biases."""

from __future__ import annotations

import math

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from mixtrain.config.choices import Balancing
from mixtrain.config.plan import Plan
from mixtrain.engine.layers.balanced_router import BalancedRouter
from mixtrain.system import collectives

# each auxiliary loss -> its name in Megatron-Core's tracker
BALANCING_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


class ExpertLoad:
    """Counts the tokens that each layer routes to each expert, with a forward hook on the routers.

    Counts are [num_layers, num_moe_experts], summed over microbatches and ranks, after dropping by
    capacity. A token counts once for each of its experts.
    """

    def __init__(self, plan: Plan, models: list[torch.nn.Module], device: torch.device):
        shape = (plan.config.model.num_layers, plan.config.model.num_moe_experts)
        # layers whose router turned finite inputs into probabilities that are not finite
        self.bad = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.counts = torch.zeros(
            shape, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
        )
        self.changed = torch.zeros((), dtype=self.counts.dtype, device=device)
        for model in models:
            for module in model.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, inputs: tuple, outputs: tuple) -> None:
        # gradients are off in validation, and in the first of the two runs under full recompute
        if torch.is_grad_enabled():
            probs, routing_map = outputs
            # no synchronization with the device: the flags are read only in a bad step
            self.bad[router.layer_number - 1] |= _finite(inputs[0]) & ~_finite(probs)
            # with padding the map has entries of weight 0 that fill an expert to its capacity
            self.counts[router.layer_number - 1] += (routing_map & (probs != 0)).sum(dim=0)
            if isinstance(router, BalancedRouter):
                self.changed += router.changed_choices

    def clear(self) -> None:
        """Reset the counts and Megatron-Core's tracked auxiliary losses before a step."""
        self.counts.zero_()
        self.changed.zero_()
        self.bad.zero_()
        moe_utils.clear_aux_losses_tracker()

    def collect(self) -> list[list[int]]:
        """Return the step's counts over all ranks. Every rank must call."""
        total = self.counts.clone()
        torch.distributed.all_reduce(total)
        return [[round(count) for count in layer] for layer in total.tolist()]

    def balanced_choices_changed(self, plan: Plan, sequences: int) -> dict[str, float]:
        """{"balanced_choices_changed": share of a step's choices that top-k would not make}.

        {} with another router. Every rank must call.
        """
        if Balancing.balanced not in plan.config.router.moe_router_load_balancing_type:
            return {}
        changed = self.changed.clone()
        torch.distributed.all_reduce(changed)
        return {"balanced_choices_changed": changed.item() / _routed(plan, sequences)}

    def not_finite(self) -> list[list[int]]:
        """Return [layer, rank] of the routers that were first to be not finite in this step.

        Their inputs were finite, their probabilities not. Every rank must call.
        """
        bad_layers = collectives.gather((self.bad.nonzero().flatten() + 1).tolist())
        return sorted([layer, rank] for rank, layers in enumerate(bad_layers) for layer in layers)


def token_drop_rate(plan: Plan, counts: list[list[int]], sequences: int) -> dict[str, float]:
    """Return {"token_drop_rate": dropped / routed} of a step; {} without a capacity factor.

    `counts`: what ExpertLoad.collect returned. A token is routed once for each of its experts in
    every layer.
    """
    if plan.config.dispatcher.moe_expert_capacity_factor is None:
        return {}
    return {"token_drop_rate": 1 - sum(map(sum, counts)) / _routed(plan, sequences)}


def _routed(plan: Plan, sequences: int) -> int:
    """Choices of experts in a step of `sequences`, over all layers."""
    model = plan.config.model
    return sequences * plan.config.data.seq_length * model.moe_router_topk * model.num_layers


def forget_model() -> None:
    """Clear Megatron-Core's tracker, whose tensors have the model's number of layers.

    A next model may have another number.
    """
    try:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker  # 0.19
    except ImportError:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    else:
        destroy_moe_metrics_tracker()


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    """Return whether all entries are finite, by their sum: one kernel and no memory."""
    return tensor.detach().sum().isfinite()


def expert_biases(models: list[torch.nn.Module]) -> list[torch.Tensor]:
    """Return the routers' biases on this rank (buffers, not parameters); [] without them."""
    routers = (
        module for model in models for module in model.modules() if isinstance(module, TopKRouter)
    )
    return [router.expert_bias for router in routers if router.expert_bias is not None]


def expert_bias(
    plan: Plan, models: list[torch.nn.Module], device: torch.device
) -> dict[str, list[list[float]]]:
    """Return {"expert_bias": [num_layers][num_moe_experts]}; {} without biases.

    Every rank must call. All ranks of a pipeline stage have equal biases; the pipeline group sums
    each stage's rows.
    """
    if not plan.config.router.moe_router_enable_expert_bias:
        return {}
    biases = torch.zeros(
        plan.config.model.num_layers, plan.config.model.num_moe_experts, device=device
    )
    for model in models:
        for module in model.modules():
            if isinstance(module, TopKRouter):
                biases[module.layer_number - 1] = module.expert_bias
    torch.distributed.all_reduce(biases, group=parallel_state.get_pipeline_model_parallel_group())
    return {"expert_bias": biases.tolist()}


def collect_balancing_loss(plan: Plan, microbatches: int, device: torch.device) -> float | None:
    """Return the step's auxiliary loss, without its coefficient.

    The mean over types, layers and microbatches: 1 if every expert has the same load. None without
    an auxiliary loss, and if it is not finite, as in a skipped step. Every rank must call.
    """
    kinds = balancing_types(plan)
    if not kinds:
        return None
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for kind in kinds:
        name = BALANCING_LOSSES[kind]
        if name in tracker:  # absent on a pipeline stage without layers
            # a rank's value is its tokens' share of the loss of its data-parallel rank's
            # microbatch, or for global_aux_loss of the whole data-parallel group's
            replicas = 1 if kind == "global_aux_loss" else plan.data_parallel_size
            total += tracker[name]["values"].sum(dtype=torch.float64) / replicas
    torch.distributed.all_reduce(total)
    mean = total.item() / (len(kinds) * plan.config.model.num_layers * microbatches)
    return mean if math.isfinite(mean) else None


def balancing_types(plan: Plan) -> list[str]:
    """Return the router's auxiliary losses; like upstream, without those of coefficient 0."""
    router = plan.config.router
    pairs = zip(router.moe_router_load_balancing_type, router.moe_aux_loss_coeff, strict=True)
    return [
        kind.name for kind, coefficient in pairs if coefficient and kind.name in BALANCING_LOSSES
    ]
