"""Qwen2-MoE, as Qwen/Qwen1.5-MoE-A2.7B: Qwen2MoeForCausalLM of transformers. No torch."""

from mixtrain.config.families.family import (
    ACTIVATION,
    ANY,
    ATTENTION,
    HEAD_NORM,
    KEYS,
    LAYER,
    MEGATRON,
    MLP_EXPERTS,
    NO_QK_NORM,
    Family,
    Requirement,
    TensorMapping,
)

SHARED = LAYER + "mlp.shared_expert."
BIASES = " ".join(f"{ATTENTION}{part}_proj.bias" for part in "qkv")

FAMILY = Family(
    name="Qwen2-MoE",
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    keys=[
        *KEYS,
        ("num_experts", "model.num_moe_experts"),
        ("moe_intermediate_size", "model.moe_ffn_hidden_size"),
        ("shared_expert_intermediate_size", "model.moe_shared_expert_intermediate_size"),
        ("intermediate_size", "model.ffn_hidden_size"),  # of a dense layer; the model has none
    ],
    defaults={
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": None,
        "num_experts_per_tok": 4,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632,
        "rope_theta": 1e4,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
    },
    features=[
        NO_QK_NORM,
        HEAD_NORM,
        Requirement("model.add_qkv_bias", [True], "{} has a bias of queries, keys and values"),
        Requirement("model.moe_shared_expert_intermediate_size", [ANY], "{} has a shared expert"),
        Requirement("model.moe_shared_expert_gate", [True], "{} has a gate of its shared expert"),
    ],
    tensors=[
        TensorMapping(MEGATRON + "self_attention.linear_qkv.bias", "qkv", BIASES),
        *MLP_EXPERTS,
        TensorMapping(
            MEGATRON + "mlp.shared_experts.gate_weight",
            "none",
            LAYER + "mlp.shared_expert_gate.weight",
        ),
        TensorMapping(
            MEGATRON + "mlp.shared_experts.linear_fc1.weight",
            "gate_up",
            f"{SHARED}gate_proj.weight {SHARED}up_proj.weight",
        ),
        TensorMapping(
            MEGATRON + "mlp.shared_experts.linear_fc2.weight", "none", SHARED + "down_proj.weight"
        ),
    ],
    fixed=ACTIVATION
    | {"qkv_bias": [True], "decoder_sparse_step": [1], "mlp_only_layers": [[], None]},
    norm_topk_key="norm_topk_prob",
    has_window_switch=True,
    published={
        "Qwen/Qwen1.5-MoE-A2.7B": (
            "qwen15_moe_a27b",
            {"router.moe_router_pre_softmax": True},  # norm_topk_prob: false
        )
    },
)
