"""Mixtral 8x7B and 8x22B: MixtralForCausalLM of transformers. No torch."""

from mixtrain.config.families.family import (
    FC1,
    FC2,
    HEAD_NORM,
    KEYS,
    LAYER,
    NO_QK_NORM,
    NO_QKV_BIAS,
    NO_SHARED_EXPERT,
    NO_SHARED_GATE,
    ROUTER,
    Family,
    TensorMapping,
)

MOE = LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{expert}."

FAMILY = Family(
    name="Mixtral",
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    keys=[
        *KEYS,
        ("num_local_experts", "model.num_moe_experts"),
        ("intermediate_size", "model.moe_ffn_hidden_size"),
    ],
    defaults={
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "intermediate_size": 14336,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    features=[NO_QK_NORM, HEAD_NORM, NO_QKV_BIAS, NO_SHARED_EXPERT, NO_SHARED_GATE],
    tensors=[
        TensorMapping(ROUTER, "none", MOE + "gate.weight"),
        TensorMapping(FC1, "gate_up", f"{EXPERT}w1.weight {EXPERT}w3.weight"),
        TensorMapping(FC2, "none", EXPERT + "w2.weight"),
    ],
    null_is={"num_key_value_heads": "num_attention_heads"},
    jitter=True,
    published={
        "mistralai/Mixtral-8x7B-v0.1": ("mixtral_8x7b", {}),
        "mistralai/Mixtral-8x7B-Instruct-v0.1": ("mixtral_8x7b", {}),
        "mistral-community/Mixtral-8x22B-v0.1": ("mixtral_8x22b", {}),
        # the larger vocabulary of tokenizer v3
        "mistralai/Mixtral-8x22B-Instruct-v0.1": ("mixtral_8x22b", {"model.vocab_size": 32768}),
    },
)
