"""What the routers did in a step: the load of every expert and the load-balancing loss, the same on every rank."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from mixtrain.plan import Plan

BALANCING_LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss")  # upstream's names


class ExpertLoad:
    """Counts the tokens that each expert of each layer is sent, by a hook on the routers.

    Counts of shape [num_layers, num_moe_experts], summed over microbatches and ranks; a token counts top-k times.
    """

    def __init__(self, plan: Plan, models: list[torch.nn.Module], device: torch.device):
        shape = (plan.config.model.num_layers, plan.config.model.num_moe_experts)
        self.counts = torch.zeros(shape, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        for model in models:
            for module in model.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, _inputs: tuple, outputs: tuple) -> None:
        # under full recompute a layer runs twice, first without gradients; validation has none either
        if torch.is_grad_enabled():
            self.counts[router.layer_number - 1] += outputs[1].sum(dim=0)

    def clear(self) -> None:
        """Before a step: forget the counts, and the auxiliary losses that Megatron-Core has added up."""
        self.counts.zero_()
        moe_utils.clear_aux_losses_tracker()

    def collect(self) -> list[list[int]]:
        """The counts of the step over all ranks. Every rank must call."""
        total = self.counts.clone()
        torch.distributed.all_reduce(total)
        return [[round(count) for count in layer] for layer in total.tolist()]


def collect_balancing_loss(plan: Plan) -> float | None:
    """The step's auxiliary loss without its coefficient, averaged over layers and microbatches; None without one.

    1 where every expert has the same load. Every rank must call: Megatron-Core reduces its per-layer sums here.
    """
    moe_utils.reduce_aux_losses_tracker_across_ranks()
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    sums = [tracker[name]["values"].sum() for name in BALANCING_LOSSES if name in tracker]
    return float(sum(sums)) / (plan.config.model.num_layers * plan.num_microbatches) if sums else None
