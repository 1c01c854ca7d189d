"""What a plan says of saving, of going on, of ramps, and of sizes that do not fit: elsewhere only
ranks read it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from composing import config_of, derived, plan_of

from mixtrain.config import layout_sensitive
from mixtrain.config.plan import batch_size_at, ranks_needed, resolve, samples_before
from mixtrain.config.planner import make_plan

TIED = "model.untie_embeddings_and_output_weights=false"


@pytest.mark.parametrize(
    "overrides, saves",
    [
        (["checkpoint.save_last=true", "checkpoint.save_interval=null"], True),
        (["checkpoint.save_last=false", "checkpoint.save_interval=5"], True),
        (["checkpoint.save_last=true", "checkpoint.save_interval=5"], True),
        (["checkpoint.save_last=false", "checkpoint.save_interval=null"], False),
    ],
)
def test_a_run_saves_if_it_is_told_to_between_or_at_the_end(overrides, saves):
    assert derived(*overrides).saves is saves


@pytest.mark.parametrize(
    "overrides, each",
    [
        ([], 4 + 4 + 8),  # weights, what is stepped in fp32, Adam's two moments
        (["trainer.precision=bf16"], 2 + 4 + 8),
        (["trainer.precision=fp8"], 2 + 4 + 8),
        (["optimizer.optimizer=sgd", "optimizer.use_distributed_optimizer=false"], 4 + 4 + 4),
        (["optimizer.optimizer=sgd", "trainer.precision=bf16"], 2 + 4 + 4),
    ],
    ids=str,
)
def test_a_checkpoint_has_the_bytes_of_weights_and_optimizer_of_the_whole_model(overrides, each):
    plan = derived(*overrides)
    assert plan.checkpoint_bytes == each * plan.total_parameters


def test_a_forced_router_and_mock_data_are_known():
    assert (derived().is_forced, derived().is_mock) == (False, False)
    assert (
        derived("router.moe_router_force_load_balancing=true").is_forced
        and derived("data=mock").is_mock
    )


def test_a_batch_is_cut_into_microbatches_of_every_data_parallel_rank():
    plan = plan_of("trainer.micro_batch_size=2", "trainer.global_batch_size=16")
    assert (plan.data_parallel_size, plan.microbatches_of(16), plan.microbatches_of(8)) == (2, 4, 2)


def test_a_run_that_goes_on_reads_what_its_remaining_steps_take():
    plan = plan_of("trainer.max_steps=10", "trainer.limit_val_batches=2", "data.split='80,10,10'")
    assert plan.samples_from(0, 0) == plan.samples == (160, 32, 32)
    assert plan.samples_from(4, 100) == (100 + 6 * 16, 32, 32)  # its first steps had other batches
    assert plan.samples_from(10, 100) == (100, 32, 32)
    no_test = plan_of("trainer.max_steps=10", "trainer.limit_val_batches=2", "data.split='80,20,0'")
    assert no_test.samples_from(4, 64) == (160, 32, 0)


def ramp(sizes: list[int] | None, whole: int):
    return replace(config_of().trainer, rampup_batch_size=sizes, global_batch_size=whole)


@pytest.mark.parametrize(
    "sizes, whole, at",
    [
        (None, 16, {0: 16, 99: 16}),
        ([4, 4, 12], 16, {0: 4, 3: 4, 4: 8, 7: 8, 8: 12, 11: 12, 12: 16, 13: 16, 99: 16}),
        ([4, 6, 10], 16, {0: 4, 4: 4, 5: 10, 9: 10, 10: 16, 11: 16}),
        ([8, 8, 0], 16, {0: 16, 1: 16}),  # no samples: no ramp
        ([16, 8, 10], 16, {0: 16, 5: 16}),  # no increments
        ([8, 0, 10], 16, {0: 16, 5: 16}),
        ([12, 8, 10], 16, {0: 16}),  # less than one increment
    ],
    ids=str,
)
def test_a_batch_grows_by_its_increments_at_even_distances(sizes, whole, at):
    trainer = ramp(sizes, whole)
    assert {consumed: batch_size_at(trainer, consumed) for consumed in at} == at


def test_the_samples_of_a_ramp_are_added_up_step_by_step():
    trainer = ramp([4, 4, 12], 16)
    sizes = [4, 8, 16, 16, 16]  # after 0, 4, 12, ... samples
    assert [samples_before(trainer, steps) for steps in range(6)] == [0, 4, 12, 28, 44, 60]
    assert samples_before(trainer, 5, done=1, consumed=4) == sum(sizes)
    assert samples_before(trainer, 5, done=5, consumed=70) == 70
    assert samples_before(trainer, 1, done=1, consumed=0) == 0


def test_ranks_are_the_least_common_multiple_of_both_grids():
    overrides = [
        "tensor_model_parallel_size=2",
        "pipeline_model_parallel_size=3",
        "context_parallel_size=5",
    ]
    overrides += ["expert_model_parallel_size=4", "expert_tensor_parallel_size=7"]
    assert ranks_needed(config_of(*[f"parallel.{word}" for word in overrides])) == 3 * 2 * 5 * 2 * 7
    more_dense = ["parallel.tensor_model_parallel_size=8", "parallel.expert_model_parallel_size=4"]
    assert ranks_needed(config_of(*more_dense)) == 8


def test_sizes_that_do_not_divide_are_rounded_down_and_never_below_one():
    plan = derived(
        "trainer.devices=3", "parallel.expert_model_parallel_size=16", "trainer.global_batch_size=7"
    )
    assert (plan.world_size, plan.data_parallel_size, plan.expert_data_parallel_size) == (3, 3, 1)
    assert (plan.num_microbatches, plan.num_local_experts, plan.expert_shard) == (1, 1, 1)
    plan = derived(
        "trainer.devices=1", "parallel.tensor_model_parallel_size=2", "trainer.num_nodes=1"
    )
    assert (plan.data_parallel_size, plan.dense_shard) == (1, 1)
    plan = derived(
        "parallel=ep1", "trainer.devices=2", "parallel.num_distributed_optimizer_instances=4"
    )
    assert (plan.dense_shard, plan.expert_shard) == (1, 1)
    assert derived("trainer.devices=3", "trainer.num_nodes=2").world_size == 6


def test_a_layout_string_makes_the_virtual_stages_that_it_has_and_leaves_those_that_are_typed():
    layout = [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.pipeline_model_parallel_layout='Et|t|t|L'",
    ]
    size = "virtual_pipeline_model_parallel_size"
    assert getattr(resolve(config_of(*layout)).parallel, size) == 2
    assert getattr(resolve(config_of(*layout, f"parallel.{size}=3")).parallel, size) == 3
    assert getattr(resolve(config_of()).parallel, size) is None


def test_a_warm_up_is_a_share_of_the_decay_or_nothing():
    def warm_up(*overrides: str) -> int:
        return resolve(
            config_of("optimizer.lr_warmup_steps=null", *overrides)
        ).optimizer.lr_warmup_steps

    assert warm_up("optimizer.lr_warmup_fraction=null") == 0
    assert warm_up("optimizer.lr_warmup_fraction=0.25", "optimizer.lr_decay_steps=90") == 22
    assert warm_up("optimizer.lr_warmup_fraction=0.25") == 75
    given = ["optimizer.lr_warmup_steps=7", "optimizer.lr_warmup_fraction=0.25"]
    assert resolve(config_of(*given)).optimizer.lr_warmup_steps == 7
    alone = resolve(config_of("optimizer.lr_warmup_steps=null", "trainer.max_steps=1")).optimizer
    assert alone.lr_decay_steps == 1


def test_a_plan_of_a_recipe_knows_what_was_changed_of_it():
    own = config_of()
    changed = config_of("model.hidden_size=256", "optimizer.overlap_grad_reduce=true")
    plan = make_plan(changed, recipe=("mine", own))
    assert plan.recipe == "mine"
    assert [change.key for change in plan.changed_mathematics] == ["model.hidden_size"]
    assert [change.key for change in plan.changed_execution] == ["optimizer.overlap_grad_reduce"]
    alone = make_plan(changed)
    assert (alone.recipe, alone.changed_mathematics, alone.changed_execution) == (None, (), ())


def test_a_plan_warns_of_what_its_layout_changes():
    plan = plan_of("router=sinkhorn", "parallel.context_parallel_size=2")
    (expected,) = layout_sensitive.warnings(plan.config)
    assert expected in plan.warnings and "CP 2" in expected


def test_the_state_of_a_stage_is_that_of_its_dense_and_its_experts_parameters():
    plan = derived(
        "trainer.devices=4", "parallel.pipeline_model_parallel_size=2", "parallel=ep1", TIED
    )
    stages = [
        dense * (8 + 8 / 2) + experts * (8 + 8 / 2) for dense, experts in plan.rank_parameters
    ]
    assert list(plan.stage_state_bytes) == [round(size) for size in stages]
