"""A configuration is one of Hugging Face's Mixtral, said in its own keys, or it is refused by key
and value.
"""

from __future__ import annotations

import math

import pytest
from composing import config_of
from test_convert import SHAPES, SMALL, small
from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from mixtrain.config import published_models
from mixtrain.config.key_effects import value_of
from mixtrain.config.plan import resolve
from mixtrain.errors import UserError
from mixtrain.interop.convert import hf_config, weights

NO_MIXTRAL = {
    "router.moe_router_load_balancing_type = sinkhorn": ["router=sinkhorn"],
    "router.moe_router_pre_softmax = true": ["router.moe_router_pre_softmax=true"],
    "router.moe_router_score_function = sigmoid": ["router.moe_router_score_function=sigmoid"],
    "router.moe_router_topk_scaling_factor = 2.5": ["router.moe_router_topk_scaling_factor=2.5"],
    "router.moe_router_num_groups = 2": [
        "router.moe_router_num_groups=2",
        "router.moe_router_group_topk=1",
    ],
    "model.moe_router_topk = 1": ["model.moe_router_topk=1", "router.moe_router_pre_softmax=true"],
    "model.moe_shared_expert_intermediate_size = 8": [
        "model.moe_shared_expert_intermediate_size=8"
    ],
    "dispatcher.moe_expert_capacity_factor = 1.25": ["dispatcher=drop"],
    "model.extra.rotary_interleaved = true": ["model.extra.rotary_interleaved=true"],
}


@pytest.mark.parametrize("reason", NO_MIXTRAL)
def test_a_configuration_that_is_no_mixtral_is_refused_by_key_and_value(reason):
    config = small(*NO_MIXTRAL[reason])
    (problem,) = hf_config.export_problems(config)
    assert problem.startswith(reason + ": ")
    for refuse in (
        lambda: hf_config.to_hugging_face(config),
        lambda: weights.to_hugging_face(config, {}),
        lambda: weights.to_megatron(config, {}),
    ):
        with pytest.raises(UserError, match=reason.split(" = ")[0]):
            refuse()


def test_an_expert_bias_is_refused_with_its_sigmoid():
    found = hf_config.export_problems(small("router=expert_bias"))
    assert [problem.split(" = ")[0] for problem in found] == [
        "router.moe_router_score_function",
        "router.moe_router_enable_expert_bias",
    ]


@pytest.mark.parametrize(
    "words",
    [
        *[
            [f"router={name}"]
            for name in (
                "aux_loss",
                "seq_aux_loss",
                "global_aux_loss",
                "combined",
                "none",
                "balanced",
            )
        ],
        ["router.moe_z_loss_coeff=0.001"],
        ["model.untie_embeddings_and_output_weights=false"],
        ["model.extra.attention_backend=flash"],
    ],
)
def test_what_only_decides_the_training_leaves_it_a_mixtral(words):
    assert hf_config.export_problems(small(*words)) == []


# mistralai/Mixtral-8x7B-v0.1, config.json, as transformers 4 wrote it
CONFIG_JSON = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_the_published_config_json_says_what_our_facts_say():
    assert (
        hf_config.from_hugging_face(CONFIG_JSON)
        == published_models.published()["mistralai/Mixtral-8x7B-v0.1"]
    )


def test_what_transformers_5_writes_of_it_says_the_same():
    read = MixtralConfig(**CONFIG_JSON)
    assert "rope_theta" not in read.to_dict() and read.head_dim is None
    assert hf_config.from_hugging_face(read.to_dict()) == hf_config.from_hugging_face(CONFIG_JSON)


@pytest.mark.parametrize(
    "words",
    [
        ["model=mixtral_8x7b"],
        ["model=mixtral_8x22b"],
        [*SMALL, *SHAPES["a large head"]],
        [*SMALL, *SHAPES["tied embeddings"], "model.rotary_base=5000"],
    ],
)
def test_a_configuration_goes_through_transformers_unchanged(words):
    config = resolve(config_of(*words))
    values = hf_config.to_hugging_face(config)
    for written in (values, MixtralConfig(**values).to_dict()):
        found = hf_config.from_hugging_face(written)
        assert {key: value_of(config, key) for key in found} == found | {
            "model.ffn_hidden_size": config.model.ffn_hidden_size  # Mixtral has no dense layer
        }


KNOWN = "mixtral, olmoe, qwen2_moe and qwen3_moe"
REFUSED_VALUES = {
    "hidden_act = gelu: mixtrain's Mixtral has silu": {"hidden_act": "gelu"},
    "sliding_window = 4096: mixtrain's Mixtral has null": {"sliding_window": 4096},
    f"model_type = mistral: mixtrain converts {KNOWN}": {"model_type": "mistral"},
    "auto_map: the model needs its own code; mixtrain runs none and supports only models that"
    " transformers implements": {"auto_map": {"A": "b.C"}},
    "rope_scaling = {'factor': 2.0}: mixtrain's Mixtral has null": {
        "rope_scaling": {"factor": 2.0}
    },
    "rope_parameters.rope_type = yarn: mixtrain's Mixtral has default": {
        "rope_parameters": {"rope_type": "yarn"}
    },
    "rope_theta = 1000000.0, but rope_parameters.rope_theta = 10000.0": {
        "rope_parameters": {"rope_theta": 10000.0}
    },
    "rope_theta = 0.5: model.rotary_base is a whole number": {"rope_theta": 0.5},
    "rope_theta = null is not a number above 0, up to 9,007,199,254,740,992": {"rope_theta": None},
    "rope_theta = 1000000.0, but rope_scaling.rope_theta = 5.0": {
        "rope_scaling": {"type": "default", "rope_theta": 5.0},
    },
    "rope_scaling = {'type': 'linear', 'factor': 2.0}: mixtrain's Mixtral has null": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "rope_parameters.rope_theta = 5.0, but transformers reads rope_scaling instead of"
    " rope_parameters, with rope_theta = 1000000.0; leave rope_scaling out": {
        "rope_theta": ...,
        "rope_parameters": {"rope_theta": 5.0},
        "rope_scaling": {"type": "default"},
    },
    "rope_parameters.partial_rotary_factor = 0.5: mixtrain's Mixtral has 1": {
        "rope_parameters": {"partial_rotary_factor": 0.5},
    },
    "partial_rotary_factor = 0.5: mixtrain's Mixtral has 1.0": {"partial_rotary_factor": 0.5},
    "sliding_window = 32767: mixtrain's Mixtral has null": {
        "sliding_window": 32767,
        "use_sliding_window": False,
    },
    "num_local_experts = null is not a whole number from 1 to 65,536": {"num_local_experts": None},
    "num_hidden_layers = null is not a whole number from 1 to 16,384": {"num_hidden_layers": None},
    "num_hidden_layers = 1000000 is not a whole number from 1 to 16,384": {
        "num_hidden_layers": 10**6
    },
    f"hidden_size = {10**30} is not a whole number from 1 to 1,048,576": {"hidden_size": 10**30},
    "vocab_size = 4294967296 is not a whole number from 1 to 2,147,483,647": {"vocab_size": 2**32},
    "num_hidden_layers = 16000 with num_local_experts = 60000: their product must be at most"
    " 262,144": {
        "num_hidden_layers": 16000,
        "num_local_experts": 60000,
        "num_key_value_heads": 1,
    },
    "num_hidden_layers = 16000 with num_key_value_heads = 32: their product must be at most"
    " 262,144": {
        "num_hidden_layers": 16000,
        "num_key_value_heads": 32,
    },
    "tie_word_embeddings = false is not true or false": {"tie_word_embeddings": "false"},
    "num_attention_heads = 0 is not a whole number from 1 to 65,536": {"num_attention_heads": 0},
    "num_key_value_heads = 3 must divide num_attention_heads = 32": {"num_key_value_heads": 3},
    "num_attention_heads = 24 must divide hidden_size = 4096": {"num_attention_heads": 24},
    "num_experts_per_tok = 9, but num_local_experts = 8": {"num_experts_per_tok": 9},
    "rms_norm_eps = small is not a number between 0 and 1": {"rms_norm_eps": "small"},
    "rope_theta = 1e6 is not a number above 0, up to 9,007,199,254,740,992": {"rope_theta": "1e6"},
    "rope_theta = nan is not a number above 0, up to 9,007,199,254,740,992": {
        "rope_theta": math.nan
    },
    "rope_theta = 1e+300 is not a number above 0, up to 9,007,199,254,740,992": {
        "rope_theta": 1e300
    },
    "rope_parameters = [1] is not a mapping": {"rope_parameters": [1]},
    f"model_type = null: mixtrain converts {KNOWN}": {"model_type": ...},
}


@pytest.mark.parametrize("problem", REFUSED_VALUES)
def test_a_value_that_mixtrain_has_nothing_for_is_refused(problem):
    values = {
        name: value
        for name, value in (CONFIG_JSON | REFUSED_VALUES[problem]).items()
        if value is not ...
    }
    with pytest.raises(UserError) as refused:
        hf_config.from_hugging_face(values)
    assert refused.value.problems == (f"config.json: {problem}",)


# Qwen/Qwen3-30B-A3B, config.json, as transformers 4 wrote it
QWEN3_CONFIG_JSON = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_qwen3s_config_json_says_what_our_facts_say_and_goes_through_transformers():
    values = hf_config.from_hugging_face(QWEN3_CONFIG_JSON)
    assert values == published_models.published()["Qwen/Qwen3-30B-A3B"]
    assert hf_config.from_hugging_face(Qwen3MoeConfig(**QWEN3_CONFIG_JSON).to_dict()) == values
    written = hf_config.to_hugging_face(resolve(config_of("model=qwen3_30b_a3b")))
    assert (
        written.items()
        >= {name: QWEN3_CONFIG_JSON[name] for name in written.keys() & QWEN3_CONFIG_JSON}.items()
    )
    assert written["norm_topk_prob"] is True


def test_only_qwen3_says_whether_the_weights_of_experts_are_normalised():
    config = small("model.qk_layernorm=true", "router.moe_router_pre_softmax=true")
    assert hf_config.export_problems(config) == []
    assert hf_config.to_hugging_face(config)["norm_topk_prob"] is False
    values = hf_config.from_hugging_face(QWEN3_CONFIG_JSON | {"norm_topk_prob": False})
    assert values["router.moe_router_pre_softmax"] is True
    dense = QWEN3_CONFIG_JSON | {"mlp_only_layers": [0], "decoder_sparse_step": 2}
    with pytest.raises(UserError, match="decoder_sparse_step = 2: mixtrain's Qwen3-MoE has 1"):
        hf_config.from_hugging_face(dense)


# What transformers reads as what is there already: (of which model, values that are added)
THE_SAME = {
    "rope_scaling of type default": (CONFIG_JSON, {"rope_scaling": {"type": "default"}}),
    "rope_scaling of rope_type default": (
        CONFIG_JSON,
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "rope_parameters of type default": (
        CONFIG_JSON,
        {"rope_parameters": {"rope_type": "default", "type": "default"}},
    ),
    "no rope_scaling": (CONFIG_JSON, {"rope_scaling": None}),
    "a whole rotary embedding": (CONFIG_JSON, {"partial_rotary_factor": 1.0}),
    "a whole one in rope_parameters": (
        CONFIG_JSON,
        {"rope_parameters": {"partial_rotary_factor": 1.0}},
    ),
    "swish": (CONFIG_JSON, {"hidden_act": "swish"}),
    "a window as long as the longest sequence": (CONFIG_JSON, {"sliding_window": 32768}),
    "a window behind a switch": (
        QWEN3_CONFIG_JSON,
        {"sliding_window": 4096, "use_sliding_window": False},
    ),
    "a long window with its switch": (
        QWEN3_CONFIG_JSON,
        {"sliding_window": 40960, "use_sliding_window": True},
    ),
    "no window with its switch": (
        QWEN3_CONFIG_JSON,
        {"sliding_window": None, "use_sliding_window": True},
    ),
    "no list of dense layers": (QWEN3_CONFIG_JSON, {"mlp_only_layers": None}),
}


@pytest.mark.parametrize("spelling", THE_SAME)
def test_what_transformers_reads_as_the_same_is_read_as_the_same(spelling):
    plain, more = THE_SAME[spelling]
    values = hf_config.from_hugging_face(plain | more)
    assert values == hf_config.from_hugging_face(plain)
    read = {"mixtral": MixtralConfig, "qwen3_moe": Qwen3MoeConfig}[plain["model_type"]](
        **plain | more
    ).to_dict()
    assert hf_config.from_hugging_face(read) == values


def test_as_many_key_and_value_heads_as_query_heads_where_config_json_says_null():
    values = hf_config.from_hugging_face(CONFIG_JSON | {"num_key_value_heads": None})
    # transformers 4 reads it so, and transformers 5 not at all
    assert values["model.num_query_groups"] == 32
    # of neither
    with pytest.raises(UserError, match="num_key_value_heads = null is not a whole number"):
        hf_config.from_hugging_face(QWEN3_CONFIG_JSON | {"num_key_value_heads": None})


def test_a_window_that_is_on_is_refused_by_its_size():
    on = QWEN3_CONFIG_JSON | {"use_sliding_window": True}
    with pytest.raises(UserError, match="sliding_window = 4096: mixtrain's Qwen3-MoE has null"):
        hf_config.from_hugging_face(
            {name: value for name, value in on.items() if name != "sliding_window"}
        )
    with pytest.raises(UserError, match="use_sliding_window = 1 is not true or false"):
        hf_config.from_hugging_face(on | {"use_sliding_window": 1})


@pytest.mark.parametrize(
    "config_class", [MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig]
)
def test_a_key_that_is_absent_has_the_value_that_transformers_gives_it(config_class):
    bare = {"model_type": config_class.model_type}
    assert hf_config.from_hugging_face(bare) == hf_config.from_hugging_face(
        config_class().to_dict()
    )
    said = hf_config.defaulted_keys(bare)
    assert any(line.startswith("num_experts_per_tok = ") for line in said)
    assert any(line.startswith("rope_theta = 1") for line in said)
    assert hf_config.defaulted_keys(config_class().to_dict()) == []
    with_base = hf_config.defaulted_keys(bare | {"rope_parameters": {"rope_theta": 5.0}})
    assert with_base == [line for line in said if not line.startswith("rope_theta")]


def test_clipped_projections_are_refused_by_their_key():
    values = OlmoeConfig(clip_qkv=8.0).to_dict()
    with pytest.raises(UserError, match="clip_qkv = 8.0: mixtrain's OLMoE has null"):
        hf_config.from_hugging_face(values)


def test_heads_that_do_not_fill_the_hidden_size_are_refused_where_the_family_needs_it():
    values = OlmoeConfig(head_dim=64).to_dict()
    with pytest.raises(UserError, match=r"head_dim = 64 times num_attention_heads = 16 must be"):
        hf_config.from_hugging_face(values)
