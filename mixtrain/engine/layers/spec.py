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

from mixtrain.config.choices import QkLayernormOver
from mixtrain.config.schema import ModelConfig
from mixtrain.engine.layers.attention import CoreAttention
from mixtrain.engine.layers.experts import Experts
from mixtrain.engine.layers.norm import ProjectionNorm, RMSNorm

# on disk as Transformer Engine, which fuses the first norm with the next matrix and stores it there
KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def block_spec(
    model: ModelConfig,
    config: TransformerConfig,
    vp_stage: int | None,
    router: type[TopKRouter] = TopKRouter,
) -> TransformerBlockSubmodules:
    """Return the layers of this stage (and chunk), all Mixture-of-Experts, and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(model, config, router)] * layers, layer_norm=RMSNorm
    )


def layer_spec(
    model: ModelConfig, config: TransformerConfig, router: type[TopKRouter]
) -> ModuleSpec:
    """Return the spec of a layer: norm, attention, norm, experts."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm(model, model.num_attention_heads),
        k_layernorm=qk_norm(model, model.num_query_groups),
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


def qk_norm(model: ModelConfig, heads: int) -> ModuleSpec | type:
    """The norm of queries or keys, of which there are `heads`."""
    if not model.qk_layernorm:
        return IdentityOp
    if model.qk_layernorm_over is QkLayernormOver.projection:
        return ModuleSpec(ProjectionNorm, params={"heads": heads})
    return RMSNorm
