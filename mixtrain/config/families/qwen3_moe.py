"""Qwen3-MoE, as Qwen/Qwen3-30B-A3B: Qwen3MoeForCausalLM of transformers. No torch."""

from mixtrain.config.families.family import (
    ACTIVATION,
    HEAD_NORM,
    HEAD_NORMS,
    KEYS,
    MLP_EXPERTS,
    NO_QKV_BIAS,
    NO_SHARED_EXPERT,
    NO_SHARED_GATE,
    QK_NORM,
    Family,
)

FAMILY = Family(
    name="Qwen3-MoE",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    keys=[
        *KEYS,
        ("num_experts", "model.num_moe_experts"),
        ("moe_intermediate_size", "model.moe_ffn_hidden_size"),
        ("intermediate_size", "model.ffn_hidden_size"),  # of a dense layer; the model has none
    ],
    defaults={
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_experts": 128,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "rope_theta": 1e4,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
    },
    features=[QK_NORM, HEAD_NORM, NO_QKV_BIAS, NO_SHARED_EXPERT, NO_SHARED_GATE],
    tensors=[*HEAD_NORMS, *MLP_EXPERTS],
    fixed=ACTIVATION
    | {"attention_bias": [False], "decoder_sparse_step": [1], "mlp_only_layers": [[], None]},
    aliases={"num_local_experts": "num_experts"},
    norm_topk_key="norm_topk_prob",
    has_window_switch=True,
    published={"Qwen/Qwen3-30B-A3B": ("qwen3_30b_a3b", {})},
)
