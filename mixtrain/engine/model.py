"""Build Megatron-Core's TransformerConfig and this rank's GPTModel chunks from a Plan.

Rule: config/transformer_fields.py maps keys to TransformerConfig's fields; this file adds what
needs torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from mixtrain.config.choices import Balancing, QkLayernormOver, TransformerImpl
from mixtrain.config.plan import Plan
from mixtrain.config.transformer_fields import transformer_fields
from mixtrain.engine import weight_init
from mixtrain.engine.compat import megatron_fixes
from mixtrain.engine.layers import spec as torch_layers
from mixtrain.engine.layers.balanced_router import BalancedRouter
from mixtrain.engine.layers.cpu import embedding, onednn_matmul
from mixtrain.engine.layers.loss import token_losses
from mixtrain.errors import UserError

# values that config/transformer_fields.py, which has no torch, gives by name
BY_NAME = {"silu": F.silu, "bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(plan: Plan) -> TransformerConfig:
    """Return Megatron-Core's TransformerConfig for the plan. UserError if it refuses."""
    values = transformer_fields(plan.config)
    values |= {
        name: BY_NAME[values[name]]
        for name in ("activation_func", "params_dtype", "pipeline_dtype")
    }
    if "attention_backend" in values:
        values["attention_backend"] = AttnBackend[values["attention_backend"]]
    try:
        return TransformerConfig(**values)
    # what no rule of this project checks first, mostly model.extra
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"Megatron-Core refuses this model: {' '.join(str(error).split())}"
        ) from error


def build(plan: Plan, device: torch.device, drawn: bool = True) -> list[torch.nn.Module]:
    """Build this rank's model chunks on `device`: one, or one per virtual pipeline stage.

    If not `drawn`, memory stays uninitialized; the caller loads the weights.
    """
    config = transformer_config(plan)
    chunks = plan.config.parallel.virtual_pipeline_model_parallel_size
    models = [
        build_chunk(plan, config, device, stage, drawn)
        for stage in (range(chunks) if chunks else [None])
    ]
    if plan.config.model.qk_layernorm_over is QkLayernormOver.projection:
        # Megatron-Core's finalize_model_grads sums the gradients of both norms over tensor ranks if
        # this is true: right for copies of a norm over a head, wrong for slices of a norm over the
        # projection. While the layers are built it must be true (0.19).
        config.qk_layernorm = False
    return models


def build_chunk(
    plan: Plan,
    config: TransformerConfig,
    device: torch.device,
    vp_stage: int | None,
    drawn: bool,
) -> torch.nn.Module:
    """Build one chunk on the meta device, allocate it on `device`, draw its weights."""
    with torch.device("meta"):
        model = gpt_model(plan, config, vp_stage)
        megatron_fixes.mark_tensor_parallel(model)
        # On the CPU, replace the matrix product of Megatron-Core's linear layers (_forward_impl) by
        # oneDNN's, and the embedding's forward by one whose backward touches only the rows that
        # were looked up: both are faster there.
        if device.type == "cpu" and plan.config.model.transformer_impl is TransformerImpl.torch:
            onednn_matmul.install(model)
            embedding.install(model)
        if config.bf16:
            model = in_bf16(config, model)
    weight_init.materialise(model, device)
    if drawn:
        weight_init.initialise(model, plan)
    return model


def in_bf16(config: TransformerConfig, model: torch.nn.Module) -> Float16Module:
    """Cast the parameters to bf16 and keep the buffers as they are.

    Float16Module alone casts buffers too, and a router that counts in bf16 cannot count past 256.
    """
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    wrapped = Float16Module(config, model)
    for module, original_buffers in buffers:
        module._buffers.update(original_buffers)
    return wrapped


class SeededGPTModel(GPTModel):
    """GPTModel that does not copy tied embeddings between pipeline stages while it is built.

    Upstream copies them from the first to the last stage; meta tensors hold nothing to copy.
    weight_init.py draws both under one name, so they start equal.
    """

    def _is_in_embd_group(self) -> bool:
        return False


class TorchLossGPTModel(SeededGPTModel):
    """SeededGPTModel with the loss of engine/layers/loss.py, for model.transformer_impl = torch.

    Megatron-Core's own loss runs where tensor ranks split the vocabulary, and with
    cross_entropy_loss_fusion.
    """

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """[b, s], [s, b, V / TP] -> the loss of each token [b, s]."""
        is_split = self.config.tensor_model_parallel_size > 1
        if is_split or self.config.cross_entropy_loss_fusion:
            return super().compute_language_model_loss(labels, logits)
        return token_losses(logits, labels)


def gpt_model(plan: Plan, config: TransformerConfig, vp_stage: int | None) -> GPTModel:
    """Build Megatron-Core's GPTModel for this pipeline stage (and chunk) on the default device."""
    model = plan.config.model
    virtual = {"ignore_virtual": False, "vp_stage": vp_stage}
    is_torch = model.transformer_impl is TransformerImpl.torch
    model_class = TorchLossGPTModel if is_torch else SeededGPTModel
    return model_class(
        config=config,
        transformer_layer_spec=block_spec(plan, config, vp_stage),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**virtual),
        post_process=parallel_state.is_pipeline_last_stage(**virtual),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )


def block_spec(
    plan: Plan, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return this stage's layers from the implementation that model.transformer_impl names."""
    match plan.config.model.transformer_impl:
        case TransformerImpl.torch:
            return torch_layers.block_spec(plan.config.model, config, vp_stage, router_class(plan))
        case TransformerImpl.transformer_engine:
            return get_gpt_decoder_block_spec(
                config, use_transformer_engine=True, vp_stage=vp_stage
            )
        case TransformerImpl.local:
            return local_spec(config, vp_stage)


def router_class(plan: Plan) -> type[TopKRouter]:
    """The router that router.moe_router_load_balancing_type needs."""
    balanced = Balancing.balanced in plan.config.router.moe_router_load_balancing_type
    return BalancedRouter if balanced else TopKRouter


def local_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return Megatron-Core's own layers without Transformer Engine, with the same keys on disk."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    # with Apex installed upstream would use Apex's norm, which has no RMSNorm
    spec.layer_norm = WrappedTorchNorm
    for layer in spec.layer_specs:
        layer.submodules.sharded_state_dict_keys_map = torch_layers.KEYS
    return spec
