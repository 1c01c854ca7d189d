"""Rules about the router, the dispatcher and the experts. No torch."""

from __future__ import annotations

from mixtrain.config import Balancing, ScoreFunction, TransformerImpl
from mixtrain.plan import Plan
from mixtrain.rules.nearest import Problems


def topk_within_experts(plan: Plan) -> Problems:
    topk, experts = plan.config.model.moe_router_topk, plan.config.model.num_moe_experts
    if topk > experts:
        yield f"model.moe_router_topk = {topk} must be at most model.num_moe_experts = {experts}"


def balancing_has_its_coefficient(plan: Plan) -> Problems:
    router = plan.config.router
    kind, coefficient = router.moe_router_load_balancing_type, router.moe_aux_loss_coeff
    if kind in (Balancing.sinkhorn, Balancing.none) and coefficient != 0:
        yield (
            f"router.moe_router_load_balancing_type = {kind.name} has no auxiliary loss, but"
            f" router.moe_aux_loss_coeff = {coefficient}; use router.moe_aux_loss_coeff=0"
        )


def sinkhorn_drops_nothing(plan: Plan) -> Problems:
    capacity = plan.config.dispatcher.moe_expert_capacity_factor
    if plan.config.router.moe_router_load_balancing_type is Balancing.sinkhorn and capacity is not None:
        yield (
            "router.moe_router_load_balancing_type = sinkhorn takes no dispatcher.moe_expert_capacity_factor"
            f" = {capacity}; use null"
        )


def expert_bias_has_sigmoid(plan: Plan) -> Problems:
    router = plan.config.router
    if router.moe_router_enable_expert_bias and router.moe_router_score_function is not ScoreFunction.sigmoid:
        yield (
            "router.moe_router_enable_expert_bias = true needs router.moe_router_score_function = sigmoid,"
            f" not {router.moe_router_score_function.name}"
        )


def padding_has_capacity(plan: Plan) -> Problems:
    dispatcher = plan.config.dispatcher
    if dispatcher.moe_pad_expert_input_to_capacity and dispatcher.moe_expert_capacity_factor is None:
        yield (
            "dispatcher.moe_pad_expert_input_to_capacity = true needs a dispatcher.moe_expert_capacity_factor;"
            " it is null"
        )


def local_has_no_grouped_gemm(plan: Plan) -> Problems:
    model = plan.config.model
    if model.transformer_impl is TransformerImpl.local and model.moe_grouped_gemm:
        yield (
            "model.moe_grouped_gemm = true needs model.transformer_impl = transformer_engine,"
            " not local; use model.moe_grouped_gemm=false"
        )


RULES = [
    topk_within_experts,
    balancing_has_its_coefficient,
    sinkhorn_drops_nothing,
    expert_bias_has_sigmoid,
    padding_has_capacity,
    local_has_no_grouped_gemm,
]
