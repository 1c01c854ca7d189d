"""Mixtral (mistralai/Mixtral-8x7B-v0.1 and 8x22B), as transformers' MixtralForCausalLM has it. No torch."""

from mixtrain.config.families.family import (
    DOWN,
    GATE_UP,
    LAYER,
    NO_QK_NORM,
    NO_SHARED_EXPERT,
    ROUTER,
    SIZES,
    Family,
    HfTensors,
)

MOE = LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{expert}."

FAMILY = Family(
    name="Mixtral",
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    sizes=[
        *SIZES,
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
    features=[NO_QK_NORM, NO_SHARED_EXPERT],
    tensors=[
        HfTensors(ROUTER, "whole", MOE + "gate.weight"),
        HfTensors(GATE_UP, "gate_up", f"{EXPERT}w1.weight {EXPERT}w3.weight"),
        HfTensors(DOWN, "whole", EXPERT + "w2.weight"),
    ],
    null_is={"num_key_value_heads": "num_attention_heads"},
    jitter=True,
)
