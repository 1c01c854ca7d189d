"""Rules about model.transformer_impl: what each implementation of the layers supports. No torch."""

from __future__ import annotations

from mixtrain.config.choices import (
    Accelerator,
    AttnBackend,
    Precision,
    QkLayernormOver,
    TransformerImpl,
)
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems, near_multiples

ALIGNMENT_BYTES = 16  # of a row that torch.nn.functional.grouped_mm reads
BYTES = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp8: 2}


def local_layers_support_layout(plan: Plan) -> Problems:
    """Refuse layouts that Megatron-Core's own layers reject or compute incorrectly."""
    if plan.config.model.transformer_impl is not TransformerImpl.local:
        return
    refused = {
        "tensor_model_parallel_size": "the norm of model.transformer_impl = local refuses it",
        "context_parallel_size": "the attention of model.transformer_impl = local refuses it",
        # 0.16 silently never reduces expert gradients over TP
        "expert_tensor_parallel_size": "the experts of model.transformer_impl = local compute"
        " wrong gradients with it",
    }
    for key, why in refused.items():
        if (size := getattr(plan.config.parallel, key)) > 1:
            yield f"parallel.{key} = {size}: {why}; use 1, or model.transformer_impl=torch"
    if plan.config.model.moe_grouped_gemm:
        yield (
            "model.moe_grouped_gemm = true needs model.transformer_impl = torch or"
            " transformer_engine, not local; use model.moe_grouped_gemm=false"
        )


def grouped_gemm_rows_are_aligned(plan: Plan) -> Problems:
    model = plan.config.model
    etp = plan.config.parallel.expert_tensor_parallel_size
    if model.transformer_impl is not TransformerImpl.torch or not model.moe_grouped_gemm:
        return
    unit = ALIGNMENT_BYTES // BYTES[plan.config.trainer.precision]
    for key, size, ranks in (
        ("hidden_size", model.hidden_size, 1),
        ("moe_ffn_hidden_size", model.moe_ffn_hidden_size, etp),
    ):
        if size % ranks == 0 and size // ranks % unit:
            row = f" / ETP = {size}/{ranks} = {size // ranks}" if ranks > 1 else f" = {size}"
            yield (
                f"model.{key}{row} must be a multiple of {unit} ({ALIGNMENT_BYTES} bytes of"
                f" {plan.config.trainer.precision.name}) for model.moe_grouped_gemm = true (false"
                f" takes any); use {near_multiples(size, unit * ranks)}"
            )


def attention_backend_is_supported(plan: Plan) -> Problems:
    model = plan.config.model
    cpu = plan.config.trainer.accelerator is Accelerator.cpu
    fp32 = plan.config.trainer.precision is Precision.fp32
    backend = model.attention_backend
    explicit = backend in (AttnBackend.flash, AttnBackend.fused)
    if backend is AttnBackend.fused and cpu:
        yield (
            "model.attention_backend = fused is cuDNN's and needs trainer.accelerator = gpu,"
            " not cpu; use auto"
        )
    if model.transformer_impl is TransformerImpl.local and explicit:
        yield (
            f"model.attention_backend = {backend.name}: model.transformer_impl = local has only"
            " its own; use auto, or model.transformer_impl=torch"
        )
    if fp32 and explicit and not cpu:
        yield (
            f"model.attention_backend = {backend.name} takes bf16 on a GPU, not"
            " trainer.precision = fp32; use auto"
        )


def qk_layernorm_over_projection(plan: Plan) -> Problems:
    model = plan.config.model
    if model.qk_layernorm_over is not QkLayernormOver.projection:
        return
    if not model.qk_layernorm:
        yield (
            "model.qk_layernorm_over = projection is not read with model.qk_layernorm = false;"
            " use model.qk_layernorm_over=head"
        )
    elif model.transformer_impl is not TransformerImpl.torch:
        yield (
            "model.qk_layernorm_over = projection needs model.transformer_impl = torch, not"
            f" {model.transformer_impl.name}; use model.transformer_impl=torch"
        )


RULES = [
    qk_layernorm_over_projection,
    local_layers_support_layout,
    grouped_gemm_rows_are_aligned,
    attention_backend_is_supported,
]
