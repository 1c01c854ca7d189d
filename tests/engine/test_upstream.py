"""Megatron-Core's own faults: each test shows what a rule refuses or a fix prevents.

If an upgrade makes one of these tests fail, its rule or fix can be removed.
"""

from __future__ import annotations

from importlib.metadata import version

import pytest
from composing import config_of, plan_of
from rank_workers import RankFailure, run_ranks
from test_parity import CP, EP, ETP, PP, TINY, TP, assert_same, measure, three_steps

from mixtrain.config import transformer_fields
from mixtrain.config.plan import derive, resolve
from mixtrain.config.rules import broken_rules
from mixtrain.engine.compat import megatron_fixes

OLD = version("megatron-core").startswith("0.16.")


def unchecked(overrides: list[str]):
    """Return the plan of a configuration that the rules refuse."""
    plan = derive(resolve(config_of(*TINY, *overrides)))
    assert broken_rules(plan)
    return plan


def test_batched_messages_mix_up_the_interleaved_schedule_on_two_stages(tmp_path):
    """config/transformer_fields.py always sets batch_p2p_comm to false with it.

    Both versions, in silence.
    """
    words = [EP + "1", PP + "2", "parallel.virtual_pipeline_model_parallel_size=2"]
    right = measure(words, tmp_path / "right")
    plan = derive(resolve(config_of(*TINY, *words)))
    own = transformer_fields.transformer_fields

    def batched(identity):
        from mixtrain.engine import model

        model.transformer_fields = lambda config: own(config) | {"batch_p2p_comm": True}
        return three_steps(plan, identity)

    wrong = run_ranks(2, batched, tmp_path / "wrong")[0]
    assert wrong["norms"][0] != pytest.approx(right["norms"][0], rel=1e-2)


def test_expert_tensor_parallelism_over_the_local_layers_is_wrong(tmp_path):
    """0.16: the experts' gradients are silently not reduced over their tensor ranks."""
    local = ["model.transformer_impl=local", "model.moe_grouped_gemm=false"]
    plan = unchecked([EP + "1", ETP, "trainer.devices=2", *local])
    right = measure([EP + "1", *local], tmp_path / "right")
    here = run_ranks(2, lambda identity: three_steps(plan, identity), tmp_path / "here")[0]
    assert here["losses"][0] == pytest.approx(right["losses"][0], rel=1e-5)
    if OLD:
        assert here["norms"][1] != pytest.approx(right["norms"][1], rel=1e-3)


PER_TOKEN = [EP + "1", "model.extra.calculate_per_token_loss=true"]
BY_SEQUENCE = ["router=seq_aux_loss", "router.moe_aux_loss_coeff=1"]
WEIGHED_OTHERWISE = {
    "auxiliary loss, CP2": (["router.moe_aux_loss_coeff=1"], [CP]),
    "auxiliary loss, TP2": (["router.moe_aux_loss_coeff=1"], TP),
    "z-loss alone, TP2": (["router=none", "router.moe_z_loss_coeff=1"], TP),
    "z-loss alone, CP2": (["router=none", "router.moe_z_loss_coeff=1"], [CP]),
    "by sequence, larger microbatches": (BY_SEQUENCE, ["trainer.micro_batch_size=4"]),
}


@pytest.mark.parametrize("name", WEIGHED_OTHERWISE)
def test_per_token_losses_weigh_what_a_router_adds_otherwise(name, tmp_path):
    """0.16: with calculate_per_token_loss TP, CP and other batches change the result."""
    words, other = WEIGHED_OTHERWISE[name]
    right = measure([*PER_TOKEN, *words], tmp_path / "right")
    if not OLD:
        assert_same(measure([*PER_TOKEN, *words, *other], tmp_path / "here"), right)
        return
    plan = unchecked([*PER_TOKEN, *words, *other])
    here = run_ranks(
        plan.world_size, lambda identity: three_steps(plan, identity), tmp_path / "here"
    )[0]
    assert here["losses"][0] == pytest.approx(right["losses"][0], rel=1e-5)
    assert here["norms"][0] < 0.9 * right["norms"][0]


def test_the_global_auxiliary_loss_is_divided_by_the_data_parallel_size(tmp_path):
    """megatron_fixes.py multiplies by it. Both versions are silently wrong."""
    words = [EP + "1", "router=global_aux_loss", "router.moe_aux_loss_coeff=10"]
    right = measure([*words, "trainer.micro_batch_size=8"], tmp_path / "right")
    plan = plan_of(*TINY, *words, "trainer.devices=4", "trainer.micro_batch_size=2")

    def unmended(identity):
        from megatron.core.transformer.moe.router import TopKRouter

        attach = TopKRouter.attach_and_log_load_balancing_loss
        TopKRouter.attach_and_log_load_balancing_loss = attach.__wrapped__
        return three_steps(plan, identity)

    wrong = run_ranks(4, unmended, tmp_path / "wrong")[0]
    assert wrong["balances"][0] == pytest.approx(right["balances"][0], rel=1e-5)
    assert wrong["norms"][0] < 0.5 * right["norms"][0]


@pytest.mark.skipif(not OLD, reason="mended by 0.19")
def test_the_norm_forgets_split_weights_that_megatron_did_not_draw_itself(tmp_path):
    """megatron_fixes.py marks them; 0.16 does so only where it draws them.

    Without it the norm counts only the first rank's shard.
    """
    words = [EP + "1", *TP]
    right = measure(words, tmp_path / "right")
    plan = plan_of(*TINY, *words)

    def unmarked(identity):
        megatron_fixes.mark_tensor_parallel = lambda model: None
        return three_steps(plan, identity)

    here = run_ranks(2, unmarked, tmp_path / "here")[0]
    assert here["losses"][0] == pytest.approx(right["losses"][0], rel=1e-6)
    assert here["norms"][0] < 0.9 * right["norms"][0]


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["router=sinkhorn", "router.moe_aux_loss_coeff=0.01", EP + "1"], "Sinkhorn"),
        ([EP + "1", "optimizer=sgd", "optimizer.use_distributed_optimizer=true"], "Only Adam"),
        (["model.kv_channels=15", EP + "1"], "size of tensor"),
    ],
)
def test_what_a_rule_refuses_would_end_in_a_traceback_of_a_rank(overrides, says, tmp_path):
    plan = unchecked(overrides)
    with pytest.raises(RankFailure) as stopped:
        run_ranks(plan.world_size, lambda identity: three_steps(plan, identity), tmp_path)
    assert says.lower() in str(stopped.value).lower()


@pytest.mark.skipif(not OLD, reason="mended by 0.19")
def test_a_router_without_transformer_engine_misses_a_name():
    """megatron_fixes.py defines it."""
    from pathlib import Path

    from megatron.core.transformer.moe import moe_utils

    source = Path(moe_utils.__file__).read_text()
    assert "te_general_gemm is not None" in source and "te_general_gemm = None" not in source
    assert moe_utils.te_general_gemm is None


@pytest.mark.skipif(OLD, reason="0.16 copies by itself")
def test_a_discarded_output_is_filled_again_without_a_compiler():
    """0.19 would compile a C++ extension; megatron_fixes.py copies into the shared storage."""
    import torch
    from megatron.core.tensor_parallel import random

    output = torch.arange(6.0)
    view = output.view(2, 3)
    again = output.clone()
    output.untyped_storage().resize_(0)
    random._get_share_storage()(output, again)
    assert (
        view.equal(again.view(2, 3)) and random._get_share_storage() is megatron_fixes._copy_storage
    )
