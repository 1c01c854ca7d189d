"""The edges of the rules: every element of their tables has a case, and so has the last value on
either side.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from composing import config_of

from mixtrain.config.choices import DataKind
from mixtrain.config.plan import derive, resolve
from mixtrain.config.rules import RULES, launcher, training, upstream
from mixtrain.config.rules.nearest import near_divisors, near_multiples, nearest
from mixtrain.config.schema import legal_keys

RULE = {rule.__name__: rule for rule in RULES}
TE = ("model.transformer_impl=transformer_engine", "trainer.accelerator=gpu")


def problems(rule: str, *overrides: str, **sections: dict) -> list[str]:
    """What a rule says of the default under some overrides, with keys of sections set to values as
    they are.
    """
    changed = config_of(*overrides)
    for section, keys in sections.items():
        changed = replace(changed, **{section: replace(getattr(changed, section), **keys)})
    return list(RULE[rule](derive(resolve(changed))))


FLAGS = {  # of sbatch, and whose they are
    "partition": "launcher.partition",
    "account": "launcher.account",
    "time": "launcher.time",
    "gpus-per-node": "launcher.gpus_per_node",
    "nodes": "trainer.num_nodes",
    "ntasks": "trainer.devices",
    "ntasks-per-node": "trainer.devices",
    "container-image": "launcher.container_image",
    "container-mounts": "launcher.container_mounts",
    "output": "run_dir",
    "error": "run_dir",
    "chdir": "run_dir",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_is_set_by_a_key_names_the_key(flag):
    for spelled in (flag, flag.replace("-", "_")):
        (message,) = problems("sbatch_flags_are_free", launcher={"sbatch_args": {spelled: "x"}})
        key = message.partition("set ")[2].split(",")[0].split(" ")[0]
        assert (
            message.startswith(f"launcher.sbatch_args.{spelled} has a key of its own")
            and key == FLAGS[flag]
        )
    assert key in legal_keys() and set(launcher.KEY_OF_FLAG) == set(FLAGS)


@pytest.mark.parametrize("flag", ["wrap", "test-only", "parsable", "wait", "help", "version"])
def test_a_flag_that_makes_sbatch_do_something_else_is_refused(flag):
    (message,) = problems("sbatch_flags_are_free", launcher={"sbatch_args": {flag: "x"}})
    assert "would change what the job or sbatch does" in message
    assert len(launcher.FORBIDDEN) == 6


@pytest.mark.parametrize(
    "sign, named",
    [
        ("\n", "the control character \\n"),
        ("\r", "the control character \\r"),
        ('"', "a double quote"),
    ],
)
def test_a_flag_has_nothing_that_ends_its_line_or_its_quotes(sign, named):
    (message,) = problems(
        "sbatch_flags_are_free", launcher={"sbatch_args": {"comment": f"a{sign}b"}}
    )
    assert message.startswith(f"launcher.sbatch_args.comment has {named}, which no #SBATCH line")
    assert message.endswith(" can contain; take it out")


@pytest.mark.parametrize("flag", ["-comment", "--comment", "Comment", "n", "x1", "9"])
def test_a_flag_is_a_long_name_without_dashes(flag):
    messages = problems("sbatch_flags_are_free", launcher={"sbatch_args": {flag: "x"}})
    assert bool(messages) == (flag not in ("n", "x1"))


@pytest.mark.parametrize("key", ["partition", "account"])
def test_a_name_has_letters_and_a_few_signs(key):
    assert problems("slurm_names_are_plain", launcher={key: "a_b.c,d@e+f-9"}) == []
    for sign in (" ", "'", '"', "\n", ""):
        (message,) = problems("slurm_names_are_plain", launcher={key: sign})
        assert message.startswith(f"launcher.{key} = ")


@pytest.mark.parametrize(
    "signal, first", [(None, "5:30"), ("USR1@60", "1:30"), ("USR1", "1:30"), ("B:USR1@90", "2:00")]
)
def test_the_shortest_time_is_the_warning_and_half_a_minute(signal, first):
    arguments = {"sbatch_args": {"signal": signal} if signal else {}}
    assert problems("time_leaves_room_to_train", launcher=arguments | {"time": first}) == []
    minutes, seconds = map(int, first.split(":"))
    less = 60 * minutes + seconds - 1
    (message,) = problems(
        "time_leaves_room_to_train", launcher=arguments | {"time": f"{less // 60}:{less % 60}"}
    )
    assert f"is {less} s" in message and f"at least {-(-(less + 1) // 60)} (minutes)" in message


OFFLOADED = [
    "attn_norm",
    "attn_proj",
    "core_attn",
    "expert_fc1",
    "mlp_norm",
    "moe_act",
    "qkv_linear",
]


@pytest.mark.parametrize("name", OFFLOADED)
def test_every_module_that_can_be_offloaded_may_be_named(name):
    modules = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", name]}
    assert problems("offload_needs_transformer_engine", *TE, trainer=modules) == []
    assert set(training.OFFLOAD_MODULES) == set(OFFLOADED)


RECOMPUTED = ["core_attn", "layernorm", "moe", "moe_act", "shared_experts"]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_every_module_that_can_be_recomputed_may_be_named(name):
    overrides = ("trainer.recompute_granularity=selective", f"trainer.recompute_modules=[{name}]")
    assert problems("selective_recompute_names_modules", *overrides) == []
    assert set(training.SELECTIVE_MODULES) == set(RECOMPUTED)


def test_rows_of_eight_bit_runs_are_aligned_as_those_of_bf16():
    (message,) = problems(
        "grouped_gemm_rows_are_aligned", "trainer.precision=fp8", model={"hidden_size": 188}
    )
    assert message.endswith("use 184 or 192")


GPU = "trainer.accelerator=gpu"
FSDP = ("parallel=fsdp", GPU, "checkpoint=none")
PP2 = "parallel.pipeline_model_parallel_size=2"
GROUP = "model.extra.microbatch_group_size_per_vp_stage"
CHUNKS = (PP2, "parallel.virtual_pipeline_model_parallel_size=2", "trainer.global_batch_size=32")
LAYOUT = "parallel.pipeline_model_parallel_layout="
# rule, overrides, whether it refuses them: next to another value at which it answers otherwise
EDGES = [
    (
        "one_expert_needs_pre_softmax",
        ["model.moe_router_topk=1", "router.moe_router_score_function=sigmoid"],
        False,
    ),
    ("one_expert_needs_pre_softmax", ["model.moe_router_topk=1", "router=sinkhorn"], False),
    ("one_expert_needs_pre_softmax", ["model.moe_router_topk=2"], False),
    ("balancing_types_can_be_combined", ["router=combined"], False),
    # unread
    (
        "expert_bias_needs_sigmoid",
        ["router=sinkhorn", "router.moe_router_enable_expert_bias=true"],
        False,
    ),
    (
        "flex_requirements_hold",
        [
            "dispatcher=flex",
            GPU,
            "dispatcher.moe_pad_expert_input_to_capacity=true",
            "dispatcher.moe_flex_dispatcher_backend=hybridep",
        ],
        False,
    ),
    # its own kernels read them
    ("grouped_gemm_rows_are_aligned", [*TE, "model.hidden_size=190"], False),
    # another rule's
    ("grouped_gemm_rows_are_aligned", ["parallel.expert_tensor_parallel_size=3"], False),
    (
        "attention_backend_is_supported",
        [
            "model.transformer_impl=local",
            GPU,
            "trainer.precision=bf16",
            "model.attention_backend=fused",
        ],
        True,
    ),
    (
        "attention_backend_is_supported",
        ["model.attention_backend=fused", GPU, "trainer.precision=fp32"],
        True,
    ),
    (
        "attention_backend_is_supported",
        ["model.attention_backend=flash", GPU, "trainer.precision=bf16"],
        False,
    ),
    (
        "attention_backend_is_supported",
        ["model.attention_backend=unfused", GPU, "trainer.precision=fp32"],
        False,
    ),
    ("gpus_cover_the_ranks", ["launcher.gpus_per_node=1"], False),  # of a CPU run
    (
        "mounts_need_an_image",
        ["launcher.container_mounts=[/a]", "launcher.container_image=x"],
        False,
    ),
    (
        "sequence_over_ranks",
        ["data.seq_length=126", "parallel.tensor_model_parallel_size=2"],
        False,
    ),
    (
        "batch_over_ranks",
        [
            "trainer.devices=6",
            "parallel.tensor_model_parallel_size=4",
            # of ranks that do not fit either
            "trainer.global_batch_size=18",
        ],
        False,
    ),
    ("optimizer_offload_is_consistent", ["optimizer.optimizer_offload_fraction=0.5"], True),
    ("fsdp_requirements_hold", [*FSDP, "parallel.num_distributed_optimizer_instances=2"], False),
    (
        "fsdp_requirements_hold",
        [
            *FSDP,
            "parallel.data_parallel_sharding_strategy=optim_grads",
            "parallel.num_distributed_optimizer_instances=2",
        ],
        True,
    ),
    ("fsdp_saves_nothing_yet", [*FSDP, "checkpoint.load_weights=there"], True),
    ("fsdp_saves_nothing_yet", ["checkpoint.load_weights=there"], False),
    ("split_has_three_parts", ["data.split='90,0,10'", "trainer.limit_val_batches=0"], False),
    ("data_source_is_given", ["data=mock"], False),
    *[
        ("microbatch_groups_fit", [*CHUNKS, f"{GROUP}={each}"], refused)
        for each, refused in ((2, False), (3, True), (4, False), (5, True), (1, True))
    ],  # of 4 microbatches
    (
        "microbatch_groups_fit",
        [*CHUNKS, f"{GROUP}=2", "trainer.rampup_batch_size=[16,16,100]"],
        False,
    ),
    # of 2, 4
    (
        "microbatch_groups_fit",
        [*CHUNKS, f"{GROUP}=4", "trainer.rampup_batch_size=[16,16,100]"],
        True,
    ),
    ("microbatch_groups_fit", [PP2, f"{GROUP}=9"], False),  # another rule's
    ("extra_fields_do_something", [PP2, f"{GROUP}=9"], True),
    ("extra_fields_do_something", [f"{GROUP}=9"], False),  # of one stage
    (
        "virtual_pipeline_needs_pipeline",
        ["parallel.pipeline_model_parallel_size=2", "trainer.global_batch_size=24"],
        False,
    ),
]


@pytest.mark.parametrize("rule, overrides, refused", EDGES)
def test_a_rule_answers_as_it_should_on_the_other_side_of_an_edge(rule, overrides, refused):
    assert bool(problems(rule, *overrides)) is refused


BLOCK = "block"
UNIFORM = "uniform"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
FIRST = "parallel.num_layers_in_first_pipeline_stage="
LAST = "parallel.num_layers_in_last_pipeline_stage="
EMBEDDING = "parallel.account_for_embedding_in_pipeline_split=true"
LOSS = "parallel.account_for_loss_in_pipeline_split=true"
UNITS = [  # layers, what splits them over two stages, method, recompute_num_layers, what is said
    (7, [f"{LAYOUT}'Ettt|tt|t|tL'"], BLOCK, 1, None),
    (
        7,
        [f"{LAYOUT}'Ettt|tt|t|tL'"],
        BLOCK,
        2,
        "the 1 layers of pipeline stage 0, chunk 1 (and 1 more); use 1",
    ),
    (
        8,
        [f"{LAYOUT}'Ettt|t|ttt|tL'"],
        BLOCK,
        2,
        "the 1 layers of pipeline stage 1, chunk 0 (and 1 more); use 1",
    ),
    (10, [f"{LAYOUT}'Ettt|tt|ttt|ttL'"], BLOCK, 2, None),
    (6, [f"{LAYOUT}'Ettt|tttL'"], UNIFORM, 3, None),
    (5, [f"{LAYOUT}'Ettt|ttL'"], UNIFORM, 2, "the 3 layers of pipeline stage 0; use 1"),
    (5, [f"{LAYOUT}'Ett|tttL'"], UNIFORM, 2, "the 3 layers of pipeline stage 1; use 1"),
    # beside one without any
    (3, [f"{LAYOUT}'Ettt|L'"], UNIFORM, 2, "the 3 layers of pipeline stage 0; use 1 or 3"),
    (3, [f"{LAYOUT}'Ettt|L'"], UNIFORM, 3, None),
    (3, [f"{LAYOUT}'Ettt|L'"], BLOCK, 3, None),
    (7, [f"{FIRST}3"], UNIFORM, 3, "the 4 layers of pipeline stage 1; use 1"),
    (7, [f"{LAST}3"], UNIFORM, 4, "the 3 layers of pipeline stage 1; use 1"),
    (6, [f"{FIRST}2", f"{LAST}4"], UNIFORM, 2, None),
    (6, [f"{FIRST}2", f"{LAST}4"], UNIFORM, 4, "the 2 layers of pipeline stage 0; use 2"),
    (7, [EMBEDDING], UNIFORM, 2, "the 3 layers of pipeline stage 0; use 1"),
    (7, [LOSS], UNIFORM, 2, "the 3 layers of pipeline stage 1; use 1"),
    (7, [VPP2, EMBEDDING], UNIFORM, 2, "the 1 layers of pipeline stage 0, chunk 0; use 1"),
    (8, [VPP2], UNIFORM, 2, None),
    (5, [], UNIFORM, 2, None),  # five layers on two stages: said already
]


@pytest.mark.parametrize("layers, split, method, each, end", UNITS)
def test_what_is_recomputed_at_once_fits_every_chunk_of_every_stage(
    layers, split, method, each, end
):
    overrides = ["trainer.recompute_granularity=full", f"trainer.recompute_method={method}", *split]
    overrides += [f"trainer.recompute_num_layers={each}", "parallel.pipeline_model_parallel_size=2"]
    messages = problems("full_recompute_fits_every_chunk", *overrides, f"model.num_layers={layers}")
    assert len(messages) == bool(end) and all(text.endswith(end) for text in messages), messages


UNRANKED = ["parallel.tensor_model_parallel_size=2", "trainer.devices=3"]


@pytest.mark.parametrize(
    "rule, overrides",
    [
        ("batch_over_ranks", ["trainer.global_batch_size=18"]),
        ("virtual_pipeline_needs_pipeline", ["parallel.pipeline_model_parallel_size=2", VPP2]),
        (
            "virtual_pipeline_needs_pipeline",  # three microbatches, of ranks rounded down
            [
                "parallel.pipeline_model_parallel_size=2",
                VPP2,
                "trainer.devices=5",
                "trainer.micro_batch_size=1",
                "trainer.global_batch_size=3",
            ],
        ),
        ("optimizer_instances_divide", ["parallel.num_distributed_optimizer_instances=5"]),
        ("rampup_reaches_the_batch", ["trainer.rampup_batch_size=[5,3,9]"]),
    ],
)
def test_of_ranks_that_do_not_fit_nothing_follows(rule, overrides):
    assert (
        problems("world_size_fits_dense_grid", *UNRANKED, *overrides)
        and problems(rule, *UNRANKED, *overrides) == []
    )


def test_ranks_fit_where_both_grids_divide_them():
    instances = ("optimizer_instances_divide", "parallel.num_distributed_optimizer_instances=5")
    dense = "parallel.tensor_model_parallel_size=2"
    expert = "parallel.expert_model_parallel_size=2"
    for size, refused in (("2", True), ("3", False)):
        assert (
            bool(problems(*instances, "parallel=ep1", dense, f"trainer.devices={size}")) is refused
        )
        assert (
            bool(problems(*instances, "parallel=ep1", expert, f"trainer.devices={size}")) is refused
        )


def test_what_is_next_to_a_number_is_never_itself():
    assert nearest(4, [8, 2, 4, 1, 16]) == "2 or 8" and nearest(4, [4]) == ""
    assert (
        near_divisors(5, 8) == "4 or 8"
        and near_divisors(8, 12) == "6 or 12"
        and near_divisors(4, 4) == "2"
    )
    multiples = {
        (17, 8): "16 or 24",
        (16, 8): "8 or 24",
        (8, 8): "16",
        (3, 8): "8",
        (2, 1): "1 or 3",
    }
    assert {pair: near_multiples(*pair) for pair in multiples} == multiples


NAMED = [  # prefixes, and the pair that is one
    (["corpus", "corpus"], ("corpus", "corpus")),
    (["3", "corpus", "1", "other", "1", "corpus"], ("corpus", "corpus")),
    (["corpus", "corpus/"], ("corpus", "corpus/")),
    (["corpus", f"{os.getcwd()}/corpus"], ("corpus", f"{os.getcwd()}/corpus")),
    (["../corpus", "a/../../corpus"], ("../corpus", "a/../../corpus")),
    (["corpus", "a/corpus", "corpus2", "Corpus"], None),
]


@pytest.mark.parametrize("prefixes, pair", NAMED)
def test_a_prefix_that_is_there_twice_is_found_however_it_is_spelled(prefixes, pair):
    messages = problems(
        "data_is_named_once", data={"kind": DataKind.indexed, "data_path": prefixes}
    )
    assert [text.split(",")[0] for text in messages] == (
        [f"data.data_path has {pair[0]} and {pair[1]}"] if pair else []
    )
    # of another kind: it reads none
    assert problems("data_is_named_once", data={"data_path": prefixes}) == []
    # said already
    assert problems("data_is_named_once", data={"kind": DataKind.indexed, "data_path": []}) == []


def test_a_state_may_fill_the_device_and_not_a_byte_more():
    full = derive(resolve(config_of())).state_bytes / 2**30
    assert problems("state_fits_the_device", trainer={"device_memory_gib": full}) == []
    assert problems("state_fits_the_device", trainer={"device_memory_gib": full - 2**-30})
    assert problems("state_fits_the_device", trainer={"device_memory_gib": None}) == []


RECIPE = "+recipe=mixtral_8x7b_ep8"
KEPT = (
    "trainer.recompute_granularity=null",
    "trainer.recompute_method=null",
    "trainer.recompute_num_layers=null",
)
FULL = (
    "trainer.recompute_granularity=full and trainer.recompute_method=uniform and"
    " trainer.recompute_num_layers=1"
)


def least_gib(*overrides: str) -> float:
    return derive(resolve(config_of(*overrides))).least_bytes / 2**30


def test_state_and_activations_may_fill_the_device_and_not_a_byte_more():
    full = least_gib(RECIPE)
    assert problems("activations_fit_the_device", RECIPE, trainer={"device_memory_gib": full}) == []
    assert problems(
        "activations_fit_the_device", RECIPE, trainer={"device_memory_gib": full - 2**-30}
    )
    assert problems("activations_fit_the_device", RECIPE, trainer={"device_memory_gib": None}) == []
    # the state's
    assert problems("activations_fit_the_device", RECIPE, trainer={"device_memory_gib": 59}) == []
    state = derive(resolve(config_of(RECIPE))).state_bytes / 2**30
    assert problems("activations_fit_the_device", RECIPE, trainer={"device_memory_gib": state})


@pytest.mark.parametrize(
    "overrides, enough, offered",
    [
        (
            ["trainer.micro_batch_size=2", *KEPT],
            [RECIPE, *KEPT],
            [FULL, "trainer.micro_batch_size=1"],
        ),
        (["trainer.micro_batch_size=8", *KEPT], [RECIPE, "trainer.micro_batch_size=8"], [FULL]),
        (
            ["trainer.micro_batch_size=8"],
            [RECIPE, "trainer.micro_batch_size=4"],
            ["trainer.micro_batch_size=4"],
        ),
        (
            ["trainer.micro_batch_size=6"],
            [RECIPE, "trainer.micro_batch_size=5"],
            ["trainer.micro_batch_size=3"],
        ),
        (
            ["trainer.micro_batch_size=8", *KEPT],
            [RECIPE, "trainer.micro_batch_size=2"],
            [f"{FULL} and trainer.micro_batch_size=2"],
        ),
        ([*KEPT], [RECIPE], [FULL]),
    ],
    ids=str,
)
def test_what_just_fits_the_device_is_offered(overrides, enough, offered):
    (message,) = problems(
        "activations_fit_the_device",
        RECIPE,
        *overrides,
        trainer={"device_memory_gib": least_gib(*enough)},
    )
    hint = message.partition("; use ")[2].split(", or ")
    assert hint == [*offered, "more TP or CP", "trainer.device_memory_gib=null to try anyway"]


@pytest.mark.parametrize(
    "overrides",
    [["trainer.devices=3"], ["parallel.pipeline_model_parallel_size=3", "trainer.devices=24"]],
)
def test_of_a_layout_that_does_not_fit_no_memory_is_counted(overrides):
    memory = {"device_memory_gib": least_gib(RECIPE, *KEPT, *overrides) - 1}
    assert (
        memory["device_memory_gib"]
        > derive(resolve(config_of(RECIPE, *KEPT, *overrides))).state_bytes / 2**30
    )
    assert problems("activations_fit_the_device", RECIPE, *KEPT, *overrides, trainer=memory) == []


def test_mounts_without_an_image_are_all_named():
    (message,) = problems("mounts_need_an_image", launcher={"container_mounts": ["/a", "/b"]})
    assert message.startswith("launcher.container_mounts = [/a,/b], but")


TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
PER_TOKEN = "model.extra.calculate_per_token_loss=true"
MET = [  # overrides, the fault of a version before 0.19 that they meet
    ([*TE, "parallel=ep1", *TP2], "expert_gradients_over_tp"),
    ([*TE, "parallel=ep1", *TP2, "parallel.expert_tensor_parallel_size=2"], None),
    ([*TE, "parallel=ep1", "parallel.expert_tensor_parallel_size=2"], None),
    ([*TE, *TP2], None),
    (["parallel=ep1", *TP2], None),
    ([PER_TOKEN, *TP2], "per_token_auxiliary_loss"),
    ([PER_TOKEN, "parallel.context_parallel_size=2"], "per_token_auxiliary_loss"),
    ([PER_TOKEN, "parallel.context_parallel_size=2", "router=none"], None),
    ([PER_TOKEN], None),
    (["model.extra.calculate_per_token_loss=false", *TP2], None),
    ([*TP2], None),
]


@pytest.mark.parametrize("overrides, name", MET, ids=str)
def test_a_fault_of_megatron_core_is_met_where_it_is_wrong_and_nowhere_else(
    overrides, name, monkeypatch
):
    monkeypatch.setattr(upstream, "megatron_version", lambda: (0, 18))
    messages = problems("upstream_faults_are_acknowledged", *overrides)
    assert [f"parallel.acknowledged_faults=[{name}]" in text for text in messages] == [True] * bool(
        name
    )


def test_the_version_of_megatron_core_is_its_first_two_numbers_or_none(monkeypatch):
    monkeypatch.setattr(upstream, "version", lambda name: {"megatron-core": "0.16.1"}[name])
    assert upstream.megatron_version() == (0, 16)

    def missing(name: str):
        raise upstream.PackageNotFoundError(name)

    monkeypatch.setattr(upstream, "version", missing)
    assert upstream.megatron_version() is None


@pytest.mark.parametrize(
    "there, absent", [("num_groups", "group_topk"), ("group_topk", "num_groups")]
)
def test_of_two_keys_for_groups_the_one_that_is_missing_is_named(there, absent):
    message = f"router.moe_router_{there} = 2 needs router.moe_router_{absent} too; it is null"
    assert problems("expert_groups_fit", f"router.moe_router_{there}=2") == [message]


SELECTIVE = "trainer.recompute_granularity=selective"
OFFLOADING = "trainer.fine_grained_activation_offloading=true"
FULL = [
    "trainer.recompute_granularity=full",
    "trainer.recompute_method=uniform",
    "trainer.recompute_num_layers=3",
]
RAMP = "trainer.rampup_batch_size="
WSD_STEPS = "optimizer.lr_wsd_decay_steps="
WHOLE_WARMUP = ["optimizer.lr_warmup_steps=9", "optimizer.lr_decay_steps=9"]
SAID = [  # rule, overrides, the words that its only problem has; None: none
    ("full_recompute_fits_every_chunk", ["trainer.recompute_num_layers=5"], None),
    ("full_recompute_fits_every_chunk", FULL, "does not fit the 4 layers; use"),
    (
        "selective_recompute_names_modules",
        [SELECTIVE],
        "trainer.recompute_modules = null does not fit trainer.recompute_granularity = selective",
    ),
    (
        "offload_needs_transformer_engine",
        [*TE, OFFLOADING],
        "trainer.offload_modules = null does not fit",
    ),
    (
        "offload_needs_transformer_engine",
        [*TE, "trainer.offload_modules=[moe_act]"],
        "= ['moe_act'] does not fit",
    ),
    # said of the batch
    ("rampup_reaches_the_batch", ["trainer.global_batch_size=18", f"{RAMP}[5,3,9]"], None),
    (
        "rampup_reaches_the_batch",
        ["trainer.global_batch_size=8", f"{RAMP}[8,8,64]"],
        "= 8; use null$",
    ),
    ("schedule_is_complete", [f"{WSD_STEPS}1000000"], "but only WSD reads it; use null"),
    (
        "schedule_is_complete",
        ["optimizer.lr_decay_style=WSD", *WHOLE_WARMUP],
        "needs optimizer.lr_wsd_decay_steps",
    ),
]


@pytest.mark.parametrize("rule, overrides, words", SAID)
def test_a_rule_says_one_thing_of_one_breach(rule, overrides, words):
    messages = problems(rule, *overrides)
    assert len(messages) == bool(words) and all(words in f"{text}$" for text in messages), messages


CP2 = "parallel.context_parallel_size=2"
Z = "router.moe_z_loss_coeff=0.001"
NONE = "router=none"
LIST = [
    "router.moe_router_load_balancing_type=[aux_loss,seq_aux_loss]",
    "router.moe_aux_loss_coeff=[0.01,0]",
]


@pytest.mark.parametrize(
    "overrides, met",
    [
        ([CP2], True),
        ([], False),
        ([CP2, NONE], False),
        ([CP2, NONE, Z], True),
        ([NONE, Z], False),
        ([CP2, *LIST], True),
        ([*LIST, "trainer.micro_batch_size=2"], False),
        (["router=seq_aux_loss", "trainer.micro_batch_size=2"], True),
        (["router=seq_aux_loss", "trainer.micro_batch_size=1"], False),
    ],
)
def test_per_token_losses_are_a_fault_where_something_is_weighed_by_the_layout(
    overrides, met, monkeypatch
):
    monkeypatch.setattr(upstream, "megatron_version", lambda: (0, 16))
    messages = problems(
        "upstream_faults_are_acknowledged",
        "model.extra.calculate_per_token_loss=true",
        "parallel=ep1",
        *overrides,
    )
    assert len(messages) == met
    for text in messages:
        assert text.startswith(
            "megatron-core 0.16, megatron/core/transformer/moe/router.py: calculate_per_token_loss"
        )
        assert (
            "; use model.extra.calculate_per_token_loss=false, or parallel.acknowledged_faults=["
            in text
        )
    assert [fault.file.rpartition("/")[2] for fault in upstream.FAULTS] == [
        "experts.py",
        "router.py",
    ]
