"""OLMoE, as allenai/OLMoE-1B-7B-0924: OlmoeForCausalLM of transformers. No torch."""

from mixtrain.config.families.family import (
    ACTIVATION,
    HEAD_NORMS,
    KEYS,
    MLP_EXPERTS,
    NO_QKV_BIAS,
    NO_SHARED_EXPERT,
    NO_SHARED_GATE,
    QK_NORM,
    Family,
    Requirement,
)

FAMILY = Family(
    name="OLMoE",
    model_type="olmoe",
    class_name="OlmoeForCausalLM",
    keys=[
        *KEYS,
        ("num_experts", "model.num_moe_experts"),
        ("intermediate_size", "model.moe_ffn_hidden_size"),
    ],
    defaults={
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": None,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "intermediate_size": 2048,
        "rope_theta": 1e4,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
    },
    features=[
        QK_NORM,
        Requirement(
            "model.qk_layernorm_over",
            ["projection"],
            "{} has one norm over the projections of all heads",
        ),
        NO_QKV_BIAS,
        NO_SHARED_EXPERT,
        NO_SHARED_GATE,
    ],
    tensors=[*HEAD_NORMS, *MLP_EXPERTS],
    fixed=ACTIVATION | {"attention_bias": [False], "clip_qkv": [None]},
    norm_topk_key="norm_topk_prob",
    heads_fill_hidden=True,  # the norm of queries has hidden_size weights
    published={
        "allenai/OLMoE-1B-7B-0924": (
            "olmoe_1b_7b",
            {"router.moe_router_pre_softmax": True},  # norm_topk_prob: false
        )
    },
    null_is={"num_key_value_heads": "num_attention_heads"},
)
