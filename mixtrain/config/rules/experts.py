"""Rules about the router, the dispatcher and the experts. No torch."""

from __future__ import annotations

from mixtrain.config.choices import (
    Accelerator,
    Balancing,
    Dispatcher,
    FlexBackend,
    ScoreFunction,
    TransformerImpl,
)
from mixtrain.config.key_effects import show
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems, must_divide

# without an auxiliary loss, so they cannot be combined
ALONE = (Balancing.sinkhorn, Balancing.none, Balancing.balanced)


def expert_parallel_divides_experts(plan: Plan) -> Problems:
    size = plan.config.parallel.expert_model_parallel_size
    experts = plan.config.model.num_moe_experts
    yield from must_divide(
        "parallel.expert_model_parallel_size", size, "model.num_moe_experts", experts
    )


def topk_within_experts(plan: Plan) -> Problems:
    topk = plan.config.model.moe_router_topk
    experts = plan.config.model.num_moe_experts
    if topk > experts:
        yield f"model.moe_router_topk = {topk} must be at most model.num_moe_experts = {experts}"


def one_expert_needs_pre_softmax(plan: Plan) -> Problems:
    router = plan.config.router
    if plan.config.model.moe_router_topk > 1 or Balancing.sinkhorn in _types(plan):
        return
    softmax = router.moe_router_score_function is ScoreFunction.softmax
    if softmax and not router.moe_router_pre_softmax:
        yield (
            "model.moe_router_topk = 1 with router.moe_router_pre_softmax = false gives every"
            " token the weight 1 and the router no gradient; use"
            " router.moe_router_pre_softmax=true, or 2 or more experts a token"
        )


def balancing_types_can_be_combined(plan: Plan) -> Problems:
    types = _types(plan)
    coefficients = plan.config.router.moe_aux_loss_coeff
    key = "router.moe_router_load_balancing_type"
    if not types:
        yield f"{key} is empty; use none"
    if len(types) != len(coefficients):
        yield (
            f"{key} has {len(types)} types, router.moe_aux_loss_coeff {len(coefficients)}"
            " numbers; give one for each"
        )
    alone = [kind.name for kind in types if kind in ALONE]
    if alone and len(types) > 1:
        yield (
            f"{key}: {alone[0]} cannot be combined with another; use {alone[0]} alone, or only"
            " auxiliary losses"
        )
    if len(set(types)) < len(types):
        yield f"{key} names a type twice: {', '.join(kind.name for kind in types)}"


def balancing_has_its_coefficient(plan: Plan) -> Problems:
    for kind, coefficient in zip(_types(plan), plan.config.router.moe_aux_loss_coeff, strict=False):
        if kind in ALONE and coefficient != 0:
            yield (
                f"router.moe_router_load_balancing_type = {kind.name} has no auxiliary loss, but"
                f" router.moe_aux_loss_coeff = {coefficient}; use router.moe_aux_loss_coeff=0"
            )


def sinkhorn_drops_nothing(plan: Plan) -> Problems:
    capacity = plan.config.dispatcher.moe_expert_capacity_factor
    if Balancing.sinkhorn in _types(plan) and capacity is not None:
        yield (
            "router.moe_router_load_balancing_type = sinkhorn takes no"
            f" dispatcher.moe_expert_capacity_factor = {capacity}; use"
            " dispatcher.moe_expert_capacity_factor=null"
        )


def balanced_sees_whole_microbatches(plan: Plan) -> Problems:
    if Balancing.balanced not in _types(plan):
        return
    config = plan.config
    refused = [
        ("parallel.tensor_model_parallel_size", config.parallel.tensor_model_parallel_size, 1,
         "sequence parallelism leaves a router only a part of the tokens to balance"),
        ("parallel.context_parallel_size", config.parallel.context_parallel_size, 1,
         "a router has only a part of each sequence to balance"),
        ("dispatcher.moe_expert_capacity_factor", config.dispatcher.moe_expert_capacity_factor,
         None, "no expert gets more than its share, so none is to be dropped"),
        ("router.moe_router_force_load_balancing", config.router.moe_router_force_load_balancing,
         False, "it would balance random scores"),
        ("model.transformer_impl", config.model.transformer_impl.name, TransformerImpl.torch.name,
         "the balanced router belongs to those layers"),
        ("model.extra.moe_router_fusion", config.model.extra.get("moe_router_fusion", False),
         False, "a fused router knows no balanced assignment"),
    ]  # fmt: skip
    for key, value, needed, why in refused:
        if value != needed:
            yield (
                f"{key} = {show(value)} cannot go with router.moe_router_load_balancing_type ="
                f" balanced: {why}; use {key}={show(needed)}"
            )


def expert_bias_needs_sigmoid(plan: Plan) -> Problems:
    router = plan.config.router
    # neither reads a bias: unread.py
    if {Balancing.sinkhorn, Balancing.balanced} & set(_types(plan)):
        return
    sigmoid = router.moe_router_score_function is ScoreFunction.sigmoid
    if router.moe_router_enable_expert_bias and not sigmoid:
        yield (
            "router.moe_router_enable_expert_bias = true needs router.moe_router_score_function ="
            f" sigmoid, not {router.moe_router_score_function.name}"
        )


def expert_groups_fit(plan: Plan) -> Problems:
    router = plan.config.router
    model = plan.config.model
    groups = router.moe_router_num_groups
    chosen = router.moe_router_group_topk
    topk = model.moe_router_topk
    if (groups is None) != (chosen is None):
        given, missing = "num_groups", "group_topk"
        if groups is None:
            given, missing = missing, given
        yield (
            f"router.moe_router_{given} = {groups or chosen} needs router.moe_router_{missing}"
            " too; it is null"
        )
    if groups is None or chosen is None:
        return
    yield from must_divide(
        "router.moe_router_num_groups", groups, "model.num_moe_experts", model.num_moe_experts
    )
    if chosen > groups:
        yield (
            f"router.moe_router_group_topk = {chosen} must be at most"
            f" router.moe_router_num_groups = {groups}"
        )
    yield from must_divide("router.moe_router_group_topk", chosen, "model.moe_router_topk", topk)
    eligible = chosen * (model.num_moe_experts // groups)
    if topk > eligible:
        yield (
            f"model.moe_router_topk = {topk}, but router.moe_router_group_topk = {chosen} groups"
            f" have only {eligible} experts"
        )


def padding_needs_capacity(plan: Plan) -> Problems:
    dispatcher = plan.config.dispatcher
    dropless = dispatcher.moe_expert_capacity_factor is None
    if dispatcher.moe_pad_expert_input_to_capacity and dropless:
        yield (
            "dispatcher.moe_pad_expert_input_to_capacity = true needs a"
            " dispatcher.moe_expert_capacity_factor; it is null"
        )


def flex_requirements_hold(plan: Plan) -> Problems:
    dispatcher = plan.config.dispatcher
    if dispatcher.moe_token_dispatcher_type is not Dispatcher.flex:
        return
    if plan.config.trainer.accelerator is Accelerator.cpu:
        yield (
            "dispatcher.moe_token_dispatcher_type = flex needs CUDA and the package deep_ep, but"
            " trainer.accelerator = cpu; use dispatcher=alltoall"
        )
    if plan.layout.ep * plan.layout.etp == 1:
        yield (
            "dispatcher.moe_token_dispatcher_type = flex needs ETP*EP of 2 or more, not 1; use"
            " dispatcher=alltoall"
        )
    padded = dispatcher.moe_pad_expert_input_to_capacity
    if padded and dispatcher.moe_flex_dispatcher_backend is FlexBackend.deepep:
        yield (
            "dispatcher.moe_pad_expert_input_to_capacity = true: deepep cannot pad; use"
            " dispatcher.moe_flex_dispatcher_backend=hybridep, or false"
        )


def shared_expert_overlap_requirements_hold(plan: Plan) -> Problems:
    dispatcher = plan.config.dispatcher
    size = plan.config.model.moe_shared_expert_intermediate_size
    if not dispatcher.moe_shared_expert_overlap:
        return
    if size is None:
        yield (
            "dispatcher.moe_shared_expert_overlap = true needs a"
            " model.moe_shared_expert_intermediate_size; it is null"
        )
    if dispatcher.moe_token_dispatcher_type is Dispatcher.allgather:
        yield "dispatcher.moe_shared_expert_overlap = true needs dispatcher=alltoall, not allgather"
    if "shared_experts" in (plan.config.trainer.recompute_modules or []):
        yield (
            "dispatcher.moe_shared_expert_overlap = true cannot be combined with shared_experts in"
            " trainer.recompute_modules"
        )


def shared_expert_gate_has_one(plan: Plan) -> Problems:
    model = plan.config.model
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        yield (
            "model.moe_shared_expert_gate = true needs a"
            " model.moe_shared_expert_intermediate_size; it is null"
        )


def _types(plan: Plan) -> list[Balancing]:
    return plan.config.router.moe_router_load_balancing_type


RULES = [
    expert_parallel_divides_experts,
    topk_within_experts,
    one_expert_needs_pre_softmax,
    balancing_types_can_be_combined,
    balancing_has_its_coefficient,
    sinkhorn_drops_nothing,
    balanced_sees_whole_microbatches,
    expert_bias_needs_sigmoid,
    expert_groups_fit,
    padding_needs_capacity,
    flex_requirements_hold,
    shared_expert_overlap_requirements_hold,
    shared_expert_gate_has_one,
]
