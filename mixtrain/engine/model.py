"""From a Plan to Megatron-Core's model: the TransformerConfig and the GPTModel chunks of this rank.

Rule: what a key means to TransformerConfig stands in config/transformer_fields.py; here is what
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

from mixtrain.config.choices import Balancing, TransformerImpl
from mixtrain.config.plan import Plan
from mixtrain.config.transformer_fields import transformer_fields
from mixtrain.engine import weight_init
from mixtrain.engine.compat import megatron_fixes
from mixtrain.engine.layers import spec as torch_layers
from mixtrain.engine.layers.balanced_router import BalancedRouter
from mixtrain.engine.layers.cpu import embedding, onednn_matmul
from mixtrain.engine.layers.loss import token_losses
from mixtrain.errors import UserError

# What config/transformer_fields.py gives by name.
BY_NAME = {"silu": F.silu, "bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(plan: Plan) -> TransformerConfig:
    """The plan as Megatron-Core's TransformerConfig."""
    values = transformer_fields(plan.config)
    values |= {
        name: BY_NAME[values[name]]
        for name in ("activation_func", "params_dtype", "pipeline_dtype")
    }
    if "attention_backend" in values:
        values["attention_backend"] = AttnBackend[values["attention_backend"]]
    try:
        return TransformerConfig(**values)
    # what no rule of ours has foreseen, model.extra above all
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"Megatron-Core refuses this model: {' '.join(str(error).split())}"
        ) from error


def build(plan: Plan, device: torch.device, drawn: bool = True) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or one per virtual pipeline stage), initialised, on `device`.

    Not `drawn`: whatever is in memory, for weights that are read.
    """
    config = transformer_config(plan)
    chunks = plan.config.parallel.virtual_pipeline_model_parallel_size
    return [
        build_chunk(plan, config, device, stage, drawn)
        for stage in (range(chunks) if chunks else [None])
    ]


def build_chunk(
    plan: Plan,
    config: TransformerConfig,
    device: torch.device,
    vp_stage: int | None,
    drawn: bool = True,
) -> torch.nn.Module:
    """One chunk: built on the meta device, given memory on `device`, drawn from the seed."""
    with torch.device("meta"):
        model = gpt_model(plan, config, vp_stage)
        megatron_fixes.mark_tensor_parallel(model)
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
    """The model with bf16 parameters, and with its buffers as they are.

    Float16Module casts them too: a router would count tokens and microbatches in bf16, which ends
    at 256.
    """
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    wrapped = Float16Module(config, model)
    for module, kept in buffers:
        module._buffers.update(kept)
    return wrapped


class SeededGPTModel(GPTModel):
    """GPTModel whose tied embeddings start equal, as weight_init.py draws them under one name; with a loss of ours.

    Upstream copies them from the first to the last pipeline stage while building, which a meta tensor has nothing for.
    """

    def _is_in_embd_group(self) -> bool:
        return False

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """[b, s], [s, b, V / TP] -> the loss of each token [b, s]."""
        split = self.config.tensor_model_parallel_size > 1
        if split or self.config.cross_entropy_loss_fusion or not self.own_loss:
            return super().compute_language_model_loss(labels, logits)
        return token_losses(logits, labels)


def gpt_model(plan: Plan, config: TransformerConfig, vp_stage: int | None) -> GPTModel:
    """Megatron-Core's GPTModel for this rank's pipeline stage (and chunk), on the current default device."""
    model = plan.config.model
    virtual = {"ignore_virtual": False, "vp_stage": vp_stage}
    made = SeededGPTModel(
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
    made.own_loss = model.transformer_impl is TransformerImpl.torch
    return made


def block_spec(
    plan: Plan, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this stage, from the implementation that model.transformer_impl names."""
    match plan.config.model.transformer_impl:
        case TransformerImpl.torch:
            return torch_layers.block_spec(config, vp_stage, router_class(plan))
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
    """Megatron-Core's own layers without Transformer Engine, under the same keys on disk."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    # upstream would take Apex's, which has no RMSNorm, where Apex is installed
    spec.layer_norm = WrappedTorchNorm
    for layer in spec.layer_specs:
        layer.submodules.sharded_state_dict_keys_map = torch_layers.KEYS
    return spec
