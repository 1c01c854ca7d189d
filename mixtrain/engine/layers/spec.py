"""The layers of a pipeline stage as Megatron-Core's module specs."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mixtrain.engine.layers.attention import CoreAttention
from mixtrain.engine.layers.experts import Experts
from mixtrain.engine.layers.norm import RMSNorm

# Transformer Engine fuses the first norm with the matrix after it and stores it there: so do we, on
# disk.
KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def block_spec(
    config: TransformerConfig, vp_stage: int | None, router: type[TopKRouter] = TopKRouter
) -> TransformerBlockSubmodules:
    """This stage's (and chunk's) layers, all Mixture-of-Experts, and the norm after the last."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, router)] * layers, layer_norm=RMSNorm
    )


def layer_spec(config: TransformerConfig, router: type[TopKRouter]) -> ModuleSpec:
    """Norm, attention, norm, experts."""
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    shared = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    moe = MoESubmodules(
        experts=ModuleSpec(Experts),
        shared_experts=ModuleSpec(SharedExpertMLP, submodules=shared),
        router=router,
    )
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(MoELayer, submodules=moe),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=KEYS,
        ),
    )
