"""Every derived number: parameters, bytes, ranks, microbatches; and what null is resolved to."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from composing import config_of, derived, plan_of

from mixtrain.config.activations import in_flight, layer_bytes
from mixtrain.config.laptop_layout import LAPTOP_RANKS, nearest_layout
from mixtrain.config.memory import GIB, layer_parameters, training_flops
from mixtrain.config.plan import Plan, ranks_needed, resolve
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config
from mixtrain.errors import UserError

RECIPE = "+recipe=mixtral_8x7b_ep8"
FP32_GRADIENTS = "optimizer.grad_reduce_in_fp32=true"
TE = "model.transformer_impl=transformer_engine"


def sizes(tp=1, pp=1, vpp="null", cp=1, ep=1, etp=1) -> list[str]:
    """A layout as overrides."""
    return [
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.virtual_pipeline_model_parallel_size={vpp}",
        f"parallel.context_parallel_size={cp}",
        f"parallel.expert_model_parallel_size={ep}",
        f"parallel.expert_tensor_parallel_size={etp}",
        f"parallel.sequence_parallel={str(tp > 1).lower()}",
    ]


# Parameters


def test_mixtral_8x7b_has_the_parameters_of_the_published_checkpoint():
    plan = plan_of(RECIPE)
    assert plan.total_parameters == 46_702_792_704
    assert plan.active_parameters / 1e9 == pytest.approx(12.88, abs=0.005)
    experts = 32 * 8 * layer_parameters(plan.config.model).expert
    assert experts / plan.total_parameters == pytest.approx(0.966, abs=0.0005)


@pytest.mark.parametrize(
    "model", [[], ["model.moe_shared_expert_intermediate_size=96", "model.qk_layernorm=true"]]
)
@pytest.mark.parametrize(
    "layout",
    [
        sizes(),
        sizes(ep=8),
        sizes(pp=4),
        sizes(pp=2, ep=4),
        sizes(tp=2, ep=2),
        sizes(tp=2, pp=2, etp=2),
    ],
)
def test_the_parameters_of_all_stages_tensor_and_expert_ranks_add_up_to_the_model(layout, model):
    plan = derived(*layout, *model)
    parallel = plan.config.parallel
    layer = layer_parameters(plan.config.model)
    tp = parallel.tensor_model_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    # norms, routers
    whole_on_each = plan.config.model.num_layers * layer.replicated + plan.config.model.hidden_size
    dense = sum(dense for dense, _ in plan.rank_parameters)
    experts = sum(expert for _, expert in plan.rank_parameters)
    assert tp * dense - (tp - 1) * whole_on_each + expert_ranks * experts == plan.total_parameters


@pytest.mark.parametrize(
    "added, parameters",
    [
        # SwiGLU's three matrices
        ("model.moe_shared_expert_intermediate_size=96", 4 * 3 * 192 * 96),
        # one weight a channel of a head, of queries and of keys
        ("model.qk_layernorm=true", 4 * 2 * 32),
    ],
)
def test_what_a_layer_may_have_beside_a_mixtrals_parts_is_counted(added, parameters):
    assert derived(added).total_parameters - derived().total_parameters == parameters
    assert derived(added).active_parameters - derived().active_parameters == parameters


def test_a_tied_output_layer_is_counted_once_and_held_by_first_and_last_stage():
    tied = "model.untie_embeddings_and_output_weights=false"
    embedding = 4096 * 192
    experts = 4 * 8 * 3 * 192 * 512
    assert derived().total_parameters - derived(tied).total_parameters == embedding
    assert derived(tied, "parallel=ep1").rank_parameters == (
        (derived(tied).total_parameters - experts, experts),
    )
    for stages in (2, 4):
        pipeline = derived(tied, *sizes(pp=stages))
        assert (
            sum(sum(rank) for rank in pipeline.rank_parameters)
            == pipeline.total_parameters + embedding
        )


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_costs_six_operations_for_every_weight_that_it_meets_and_for_its_scores(causal):
    """By hand. Of the router too, which is a thousandth of it: a tolerance would hide it."""
    attention = 192 * 192 + 2 * 192 * 2 * 32 + 192 * 192  # queries, keys and values, output
    scores = 2 * 128 * 192 / (2 if causal else 1)
    layer = attention + 192 * 8 + 3 * 192 * 96 + 2 * 3 * 192 * 512 + scores
    model = config_of("model.moe_shared_expert_intermediate_size=96").model
    assert training_flops(model, 128, causal) == 6 * (4 * layer + 4096 * 192)


# Bytes


@pytest.mark.parametrize(
    "overrides, gib",
    [
        ([], 59.6),
        ([FP32_GRADIENTS], 73.1),
        ([FP32_GRADIENTS, "trainer.num_nodes=1"], 105.7),
        ([FP32_GRADIENTS, "trainer.num_nodes=8", *sizes(pp=4, ep=8)], 18.7),
    ],
    ids=str,
)
def test_the_state_of_mixtral_8x7b_on_a_rank_is_known(overrides, gib):
    assert derived(RECIPE, *overrides).state_bytes / GIB == pytest.approx(gib, abs=0.05)


def test_the_fullest_rank_is_of_the_last_stage_which_has_the_final_norm_too():
    plan = derived(RECIPE, "trainer.num_nodes=8", *sizes(pp=4, ep=8))
    assert plan.heaviest_stage == 3
    assert (
        plan.state_bytes
        == plan.stage_state_bytes[3]
        > plan.stage_state_bytes[0]
        > plan.stage_state_bytes[1]
    )


# weight + gradient + (fp32 master copy and Adam's two moments) over the shard; fp32 training has no
# master copy fmt: off
@pytest.mark.parametrize(
    "overrides, dense, expert",
    [
        (["optimizer.use_distributed_optimizer=false", FP32_GRADIENTS], 18, 18),
        ([FP32_GRADIENTS], 2 + 4 + 12 / 16, 2 + 4 + 12 / 2),
        ([], 2 + 2 + 12 / 16, 2 + 2 + 12 / 2),
        (["optimizer.optimizer=sgd"], 2 + 2 + 8 / 16, 2 + 2 + 8 / 2),
        (["trainer.precision=fp32"], 4 + 4 + 8 / 16, 4 + 4 + 8 / 2),
        (["trainer.precision=fp32", "optimizer.use_distributed_optimizer=false"], 16, 16),
        (["parallel.num_distributed_optimizer_instances=2"], 2 + 2 + 12 / 8, 2 + 2 + 12 / 1),
    ],
    ids=str,
)
def test_bytes_a_parameter_follow_precision_gradients_and_shard(overrides, dense, expert):
    plan = derived(RECIPE, *overrides)
    ((dense_parameters, expert_parameters),) = plan.rank_parameters
    assert plan.state_bytes == dense_parameters * dense + expert_parameters * expert


# Activations


@pytest.mark.parametrize(
    "stages, stage, chunks, microbatches, passes",
    [
        (1, 0, 1, 16, [0]),
        (4, 0, 1, 16, [0] * 4),
        (4, 3, 1, 16, [0]),
        (4, 1, 1, 2, [0] * 2),  # no more than there are
        # two microbatches through the first chunk, then one through the second
        (2, 1, 2, 8, [0, 0, 1]),
        (2, 0, 2, 8, [0, 0, 1, 1, 0]),
        (2, 0, 2, 2, [0, 0, 1, 1]),
        (4, 0, 2, 8, [0] * 4 + [1] * 4 + [0] * 3),
    ],
)
def test_the_forward_passes_in_flight_are_those_of_the_schedule(
    stages, stage, chunks, microbatches, passes
):
    assert in_flight(stages, stage, chunks, microbatches) == passes


# bytes: Mixtral 8x7B, one sequence
LAYER = 4096 * (4 * 4096 + (2 * 32 + 2 * 8) * 128 + 2 * (4096 + 3 * 14336)) * 2
INPUT = 4096 * 4096 * 2
LOGITS = 4096 * 32000 * 2
ALL_KEPT = [
    "trainer.recompute_granularity=null",
    "trainer.recompute_method=null",
    "trainer.recompute_num_layers=null",
]


@pytest.mark.parametrize(
    "overrides, kept",
    [
        ([], 32 * INPUT + LAYER - INPUT),  # of one layer everything is made anew
        (["trainer.recompute_num_layers=4"], 8 * INPUT + 4 * LAYER - INPUT),
        (
            ["trainer.recompute_method=block", "trainer.recompute_num_layers=30"],
            30 * INPUT + 2 * LAYER + LOGITS,
        ),
        (
            ["trainer.recompute_method=block", "trainer.recompute_num_layers=32"],
            32 * INPUT + LAYER - INPUT,
        ),
        (ALL_KEPT, 32 * LAYER + LOGITS),
        ([*ALL_KEPT, "trainer.micro_batch_size=2"], 2 * (32 * LAYER + LOGITS)),
        ([*ALL_KEPT, TE], 32 * LAYER + 2 * LOGITS),  # which takes them in fp32
        ([*ALL_KEPT, TE, "model.extra.cross_entropy_loss_fusion=true"], 32 * LAYER + LOGITS),
        ([*ALL_KEPT, "trainer.fine_grained_activation_offloading=true"], LOGITS),
    ],
    ids=str,
)
def test_the_least_that_activations_of_mixtral_8x7b_take_is_counted_by_hand(overrides, kept):
    plan = derived(RECIPE, *overrides)
    assert plan.stage_activation_bytes == (kept,)
    assert plan.least_bytes == plan.state_bytes + kept


# numbers that a layer of the small default keeps, of a microbatch of 4 sequences of 128 tokens: 512
# rows of 192
ROWS = 512
HIDDEN = 192
HEADS = (2 * 6 + 2 * 2) * 32
FFN = 512
GPU = "trainer.accelerator=gpu"
SELECTIVE = "trainer.recompute_granularity=selective"
SHARED_FFN = "model.moe_shared_expert_intermediate_size=96"


@pytest.mark.parametrize(
    "overrides, numbers",
    [
        # on the CPU the experts' results, no product
        ([], ROWS * (4 * HIDDEN + HEADS + 2 * (2 * HIDDEN + 2 * FFN))),
        ([GPU], ROWS * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN))),
        (["model.moe_grouped_gemm=false"], ROWS * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN))),
        (
            ["model.transformer_impl=transformer_engine"],
            ROWS * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN)),
        ),
        ([GPU, "model.moe_router_topk=3"], ROWS * (4 * HIDDEN + HEADS + 3 * (HIDDEN + 3 * FFN))),
        ([GPU, SHARED_FFN], ROWS * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN) + 3 * 96)),
        (
            [GPU, SELECTIVE, "trainer.recompute_modules=[moe_act]"],
            ROWS * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 2 * FFN)),
        ),
        (
            [GPU, SELECTIVE, "trainer.recompute_modules=[layernorm]"],
            ROWS * (2 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN)),
        ),
        (
            [GPU, SELECTIVE, SHARED_FFN, "trainer.recompute_modules=[moe]"],
            ROWS * (4 * HIDDEN + HEADS),
        ),
        (
            [GPU, SELECTIVE, "trainer.recompute_modules=[moe,layernorm]"],
            ROWS * (3 * HIDDEN + HEADS),
        ),
        (
            [GPU, SELECTIVE, SHARED_FFN, "trainer.recompute_modules=[shared_experts]"],
            ROWS * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN)),
        ),
        ([GPU, *sizes(tp=2)], ROWS // 2 * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN))),
        (
            [GPU, SHARED_FFN, *sizes(tp=2)],
            ROWS // 2 * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN) + 3 * 96),
        ),
        ([GPU, *sizes(cp=2)], ROWS // 2 * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN))),
        ([GPU, *sizes(etp=2)], ROWS * (4 * HIDDEN + HEADS + 2 * 2 * HIDDEN + 2 * 3 * FFN)),
        # an expert has room for 512 * 2 * 1.25 / 8 = 160 rows; at the least two are full
        ([GPU, "dispatcher=drop"], ROWS * (4 * HIDDEN + HEADS) + 2 * 160 * (HIDDEN + 3 * FFN)),
        (
            [GPU, "dispatcher=drop_and_pad"],
            ROWS * (4 * HIDDEN + HEADS) + 8 * 160 * (HIDDEN + 3 * FFN),
        ),
        (
            [GPU, "dispatcher=drop", "dispatcher.moe_expert_capacity_factor=9"],
            ROWS * (4 * HIDDEN + HEADS + 2 * (HIDDEN + 3 * FFN)),
        ),
    ],
    ids=str,
)
def test_what_a_layer_keeps_is_counted_by_hand(overrides, numbers):
    for precision, size in (("fp32", 4), ("bf16", 2), ("fp8", 1)):
        config = derived("parallel=ep1", *overrides, f"trainer.precision={precision}").config
        assert layer_bytes(config) == numbers * size


@pytest.mark.parametrize(
    "overrides, size",
    [
        ([], 2),
        (["trainer.precision=fp32"], 4),
        (["trainer.precision=fp32", TE], 4),
        ([TE], 4),
        (["model.transformer_impl=local"], 4),
        ([*sizes(tp=2)], 4 / 2),
        ([*sizes(cp=2)], 2 / 2),
    ],
    ids=str,
)
def test_the_logits_are_in_fp32_but_for_those_of_our_own_loss(overrides, size):
    kept = [*ALL_KEPT, "trainer.fine_grained_activation_offloading=true"]
    assert derived(RECIPE, *kept, *overrides).stage_activation_bytes == (4096 * 32000 * size,)


def test_the_logits_are_on_the_last_stage_alone():
    offloaded = ["trainer.fine_grained_activation_offloading=true", *ALL_KEPT]
    assert derived(RECIPE, *offloaded, *sizes(pp=4)).stage_activation_bytes == (0, 0, 0, LOGITS)


def test_of_chunks_the_last_is_the_first_whose_layers_are_made_anew():
    layout = [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.pipeline_model_parallel_layout='Ettt|t|t|tL'",
    ]
    overrides = [
        RECIPE,
        "model.num_layers=6",
        "trainer.recompute_num_layers=3",
        *sizes(ep=8),
        *layout,
    ]
    plan = derived(
        *overrides
    )  # ten or more microbatches; passes through chunks 0 0 1 1 0 and 0 0 1
    assert plan.stage_activation_bytes == (5 * INPUT + LAYER - INPUT, 3 * INPUT + LAYER - INPUT)
    plan = derived(*[word.replace("Ettt|t|t|tL", "Ettt|tt|t|L") for word in overrides])
    assert plan.stage_activation_bytes == (5 * INPUT + LAYER - INPUT, 2 * INPUT + LOGITS)


@pytest.mark.parametrize(
    "overrides, kept",
    [
        (
            ["trainer.recompute_num_layers=null"],
            (8 * INPUT * 4 + LAYER - INPUT, 8 * INPUT * 3 + LAYER - INPUT),
        ),
        (
            ["trainer.recompute_method=block", "trainer.recompute_num_layers=7"],
            (4 * (7 * INPUT + LAYER), 3 * (7 * INPUT + LAYER)),
        ),
    ],
)
def test_a_unit_is_made_anew_while_all_that_waits_is_there_or_not_at_all(overrides, kept):
    assert (
        derived(
            RECIPE, *sizes(pp=4, ep=8), "trainer.num_nodes=4", *overrides
        ).stage_activation_bytes[:2]
        == kept
    )


def test_a_stage_without_layers_keeps_nothing_and_makes_nothing_anew():
    layout = [
        "parallel.pipeline_model_parallel_size=3",
        "parallel.pipeline_model_parallel_layout='E|(t)*32|L'",
    ]
    assert derived(RECIPE, *sizes(ep=8), *layout).stage_activation_bytes[0] == 0


def test_of_a_sequence_that_is_split_over_tensor_ranks_each_keeps_its_part_of_the_inputs():
    whole = derived(RECIPE)
    half = derived(RECIPE, *sizes(tp=2, ep=8))
    assert half.stage_activation_bytes[0] == whole.stage_activation_bytes[0] / 2


def test_the_stage_that_needs_most_is_not_the_one_with_the_largest_state():
    plan = derived("+recipe=mixtral_8x7b_tp2_pp4_ep4", *sizes(pp=4, ep=4))
    assert (plan.heaviest_stage, plan.fullest_stage) == (3, 0)


# Ranks and batches


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (
            [],
            dict(
                world_size=2,
                data_parallel_size=2,
                expert_data_parallel_size=1,
                num_microbatches=2,
                tokens_per_step=2048,
                num_local_experts=4,
                dense_shard=2,
                expert_shard=1,
            ),
        ),
        (
            ["parallel=ep1"],
            dict(
                world_size=1,
                data_parallel_size=1,
                expert_data_parallel_size=1,
                num_microbatches=4,
                num_local_experts=8,
                dense_shard=1,
                expert_shard=1,
            ),
        ),
        (
            [RECIPE],
            dict(
                world_size=16,
                data_parallel_size=16,
                expert_data_parallel_size=2,
                num_microbatches=16,
                tokens_per_step=1_048_576,
                num_local_experts=1,
                dense_shard=16,
                expert_shard=2,
            ),
        ),
        (
            [
                "trainer.devices=4",
                "trainer.micro_batch_size=2",
                "parallel.num_distributed_optimizer_instances=2",
            ],
            dict(
                world_size=4,
                data_parallel_size=4,
                expert_data_parallel_size=2,
                num_microbatches=2,
                dense_shard=2,
                expert_shard=1,
            ),
        ),
        (
            [*sizes(pp=2, ep=2), "trainer.devices=8"],
            dict(
                world_size=8,
                data_parallel_size=4,
                expert_data_parallel_size=2,
                num_microbatches=1,
                num_local_experts=4,
            ),
        ),
        (
            [TE, *sizes(tp=2, cp=2, ep=4), "trainer.devices=8"],
            dict(
                world_size=8,
                data_parallel_size=2,
                expert_data_parallel_size=2,
                dense_shard=4,
                expert_shard=2,
                num_local_experts=2,
            ),
        ),
        (
            [TE, *sizes(tp=2, ep=2, etp=2), "trainer.devices=8"],
            dict(data_parallel_size=4, expert_data_parallel_size=2, num_local_experts=4),
        ),
    ],
    ids=str,
)
def test_sizes_follow_from_world_size_and_layout(overrides, wanted):
    plan = plan_of(*overrides)
    assert {name: getattr(plan, name) for name in wanted} == wanted
    assert (
        plan.num_microbatches * plan.data_parallel_size * plan.config.trainer.micro_batch_size
        == (plan.config.trainer.global_batch_size)
    )


def test_a_run_reads_as_many_samples_as_its_steps_and_validations_need():
    few = ["trainer.max_steps=10", "trainer.limit_val_batches=3"]
    assert plan_of(*few).samples == (160, 48, 48)
    assert plan_of(*few, "data.split='90,10,0'").samples == (160, 48, 0)
    assert plan_of("trainer.max_steps=10", "trainer.limit_val_batches=0").samples == (160, 0, 0)


def test_a_plan_cannot_be_written_to():
    with pytest.raises(FrozenInstanceError):
        plan_of().world_size = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        layer_parameters(plan_of().config.model).expert = 1  # type: ignore[misc]


# What null becomes


@pytest.mark.parametrize(
    "overrides, world_size, devices",
    [
        ([], None, 2),
        (["trainer.num_nodes=2"], None, 1),
        ([*sizes(pp=2, ep=4)], None, 8),
        ([*sizes(tp=2, ep=3)], None, 6),  # the least common multiple of both grids
        ([], 4, 4),
        (["trainer.num_nodes=2"], 4, 2),
        (["trainer.devices=8"], 4, 8),  # what the user typed stays
    ],
)
def test_devices_become_what_the_layout_needs_or_the_launcher_started(
    overrides, world_size, devices
):
    assert resolve(config_of(*overrides), world_size).trainer.devices == devices


@pytest.mark.parametrize(
    "layout, layers",
    [
        (sizes(), 2),
        (sizes(ep=8), 2),
        (sizes(pp=2), 2),
        (sizes(pp=4), 4),
        (sizes(pp=2, vpp=2), 4),
        (sizes(pp=2, vpp=3), 6),
    ],
)
def test_layers_become_what_pipeline_and_chunks_need(layout, layers):
    assert resolve(config_of("model.num_layers=null", *layout)).model.num_layers == layers


def test_the_learning_rate_decays_over_the_run_and_always_after_the_warmup():
    def decay(*overrides: str) -> int:
        return resolve(config_of(*overrides)).optimizer.lr_decay_steps

    assert decay() == 300
    assert decay("optimizer.lr_decay_steps=77") == 77
    # 20 steps of warmup: a run shortened on the command line stays legal
    assert decay("trainer.max_steps=5") == 21


def test_a_resolved_configuration_has_nothing_left_to_resolve():
    config = plan_of(RECIPE, "+shrink=laptop").config
    assert None not in (
        config.trainer.devices,
        config.model.num_layers,
        config.optimizer.lr_decay_steps,
    )
    assert resolve(config) == config


def test_a_plan_is_refused_with_the_problems_known_before_first():
    with pytest.raises(UserError) as refused:
        make_plan(config_of("model.moe_router_topk=9"), None, ["a word"])
    assert [problem.split(" =")[0] for problem in refused.value.problems] == [
        "a word",
        "model.moe_router_topk",
    ]
    with pytest.raises(UserError):
        make_plan(config_of(), None, ["a word"])


# The nearest layout


def replanned(config: Config, overrides: list[str]) -> Plan:
    """The plan of the same command line with what was offered typed after it."""
    return plan_of(*overrides, *nearest_layout(config).split())


@pytest.mark.parametrize(
    "layout",
    [
        sizes(ep=8, pp=4),
        sizes(ep=8, pp=4, vpp=2),
        sizes(ep=8, pp=2),
        sizes(tp=4, pp=4, ep=8),
        sizes(tp=2, cp=8, ep=8),
        sizes(tp=8, pp=16, cp=4, ep=8, etp=2, vpp=2),
        sizes(ep=8, pp=7),
        sizes(ep=8, pp=7, vpp=2),
        sizes(tp=2, ep=8, pp=11),
        sizes(cp=16),
        sizes(ep=8, etp=4),
    ],
    ids=lambda layout: "-".join(word.split("=")[1] for word in layout),
)
def test_the_nearest_layout_is_accepted_and_fits_a_laptop(layout):
    overrides = [RECIPE, "+shrink=laptop", TE, *layout]
    config = resolve(config_of(*overrides))
    assert ranks_needed(config) > LAPTOP_RANKS
    assert replanned(config, overrides).world_size <= LAPTOP_RANKS


@pytest.mark.parametrize("devices", ["trainer.devices=16", "trainer.devices=8 trainer.num_nodes=3"])
def test_the_nearest_layout_undoes_a_number_of_ranks_that_was_typed(devices):
    overrides = [RECIPE, "+shrink=laptop", *devices.split()]
    assert replanned(resolve(config_of(*overrides)), overrides).world_size == 8


@pytest.mark.parametrize(
    "layout, offered",
    [
        (sizes(pp=4, ep=8), {"expert_model_parallel_size": "2"}),
        (sizes(pp=2, ep=8), {"expert_model_parallel_size": "4"}),
        (sizes(pp=4, vpp=2, ep=8), {"expert_model_parallel_size": "2"}),
        # the dense grid has as many ranks
        (sizes(tp=4, ep=8, pp=2), {"expert_model_parallel_size": "4"}),
        # a prime is kept whole or lost: of two, the one that less of an expert model's code hangs
        # on
        (sizes(cp=3, pp=5), {"context_parallel_size": "1"}),
        (sizes(pp=5, tp=3), {"pipeline_model_parallel_size": "1"}),
        (
            sizes(pp=7, vpp=2, ep=8),
            {"pipeline_model_parallel_size": "1", "virtual_pipeline_model_parallel_size": "null"},
        ),
        (sizes(tp=3, etp=5), {"tensor_model_parallel_size": "1", "sequence_parallel": "false"}),
        (sizes(etp=5, ep=3), {"expert_tensor_parallel_size": "1"}),
    ],
    ids=lambda value: (
        "-".join(word.split("=")[1] for word in value) if isinstance(value, list) else ""
    ),
)
def test_the_nearest_layout_keeps_every_kind_of_parallelism_it_can_and_the_experts_longest(
    layout, offered
):
    overrides = dict(word.split("=") for word in nearest_layout(config_of(*layout)).split())
    assert overrides.pop("trainer.num_nodes") == "1"
    assert int(overrides.pop("trainer.devices")) <= LAPTOP_RANKS
    assert overrides == {f"parallel.{key}": value for key, value in offered.items()}
