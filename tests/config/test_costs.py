"""Parameters and bytes of a rank as the plan counts them, against the tensors that the rank really
holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from composing import config_of, plan_of
from megatron.core import parallel_state
from rank_workers import run_ranks
from test_parity import EP, PLAIN, PP, SHARED, TINY

from mixtrain.config.choices import Precision, Sharding
from mixtrain.config.memory import bytes_per_parameter, stage_parameters
from mixtrain.config.plan import Plan
from mixtrain.engine import model, optimizer, process_groups
from mixtrain.system.rank_identity import Identity
from mixtrain.training import loop
from mixtrain.training.signals import StopRequest

TIED = "model.untie_embeddings_and_output_weights=false"
MODELS = {
    "plain": [EP + "1"],
    "tied embeddings": [EP + "1", TIED],
    "qk_layernorm": [EP + "1", "model.qk_layernorm=true"],
    "shared expert": [EP + "1", SHARED],
    "EP2": [EP + "2"],
    "PP2": [EP + "1", PP + "2"],
    "PP2, tied embeddings": [EP + "1", PP + "2", TIED],
    "PP4, tied embeddings": [EP + "1", PP + "4", TIED],
    "PP2, first stage of 1": [EP + "1", PP + "2", "parallel.num_layers_in_first_pipeline_stage=1"],
    "PP2xVPP2, layout": [EP + "1", PP + "2", "parallel.pipeline_model_parallel_layout='Et|tt|t|L'"],
    "EP2xPP2": [EP + "2", PP + "2"],
}


def counted(plan: Plan, identity: Identity) -> tuple[int, list[int]]:
    """(pipeline stage, [parameters that are no expert's, parameters of experts]) of the real model
    on this rank.
    """
    with process_groups.start(plan, identity) as here:
        found = [0, 0]
        for chunk in model.build(plan, here.device):
            for name, parameter in chunk.named_parameters():
                found[".mlp.experts." in name] += parameter.numel()
        return parallel_state.get_pipeline_model_parallel_rank(), found


@pytest.mark.parametrize("name", MODELS)
def test_a_rank_has_the_parameters_that_the_plan_counts(name, tmp_path):
    plan = plan_of(*TINY, *MODELS[name])
    parts = run_ranks(plan.world_size, lambda identity: counted(plan, identity), tmp_path)
    assert sorted({stage for stage, _ in parts}) == list(range(len(plan.rank_parameters)))
    for stage, found in parts:
        assert tuple(found) == plan.rank_parameters[stage]
        assert plan.rank_parameters[stage] == stage_parameters(
            plan.config.model, plan.config.parallel, stage
        )


@pytest.mark.parametrize("name", ["plain", "tied embeddings", "qk_layernorm", "shared expert"])
def test_all_parameters_are_those_of_one_rank_that_has_everything(name):
    plan = plan_of(*TINY, *MODELS[name])
    assert plan.total_parameters == sum(plan.rank_parameters[0])


def test_tensor_parallelism_divides_what_the_real_layers_divide():
    """Not run here: the layers that can be cut this way need Transformer Engine. By hand, from
    megatron's shapes.
    """
    overrides = [
        "parallel.tensor_model_parallel_size=2",
        "parallel.expert_tensor_parallel_size=2",
        EP + "1",
    ]
    config = config_of(*TINY, SHARED, *overrides)
    layer = 64 * (4 + 2 * 2) * 16 // 2 + 4 * 16 * 64 // 2 + 3 * 64 * 64 // 2 + 2 * 64 + 64 * 8
    assert stage_parameters(config.model, config.parallel, 0) == (
        4 * layer + 2 * 256 // 2 * 64 + 64,
        4 * 8 * 3 * 64 * 96 // 2,
    )


BF16_GRADIENTS = "optimizer.grad_reduce_in_fp32=false"
SGD = "optimizer=sgd"
# precision, overrides, then whole bytes of a parameter and bytes that are divided by the shard
BYTES = {
    "bf16": (Precision.bf16, [PLAIN], 18, 0),
    "bf16, sharded": (Precision.bf16, [], 6, 12),
    "bf16 gradients, sharded": (Precision.bf16, [BF16_GRADIENTS], 4, 12),
    "fp8": (Precision.fp8, [], 6, 12),
    "fp32": (Precision.fp32, [PLAIN], 16, 0),
    "fp32, sharded": (Precision.fp32, [], 8, 8),
    "fp32 ignores the gradients' type": (Precision.fp32, [BF16_GRADIENTS], 8, 8),
    "bf16, sgd": (Precision.bf16, [SGD], 14, 0),
    "fp32, sgd": (Precision.fp32, [SGD], 12, 0),
}


@pytest.mark.parametrize("shard", [1, 2, 16])
@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_a_parameter_are_those_of_its_weight_gradient_and_optimizer(name, shard):
    precision, overrides, whole, divided = BYTES[name]
    assert (
        bytes_per_parameter(precision, config_of(*overrides).optimizer, shard)
        == whole + divided / shard
    )


@pytest.mark.parametrize(
    "sharding, whole, divided",
    [(Sharding.optim, 6, 12), (Sharding.optim_grads, 2, 16), (Sharding.optim_grads_params, 0, 18)],
)
@pytest.mark.parametrize("shard", [1, 8])
@pytest.mark.parametrize("overrides", [[], [PLAIN]], ids=str)
def test_megatron_fsdp_divides_the_optimizer_then_gradients_then_weights(
    sharding, whole, divided, shard, overrides
):
    settings = config_of(*overrides).optimizer
    assert bytes_per_parameter(Precision.bf16, settings, shard, sharding) == whole + divided / shard


def step_of_bytes(plan: Plan, identity: Identity) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on this rank after one step; the parameters of a
    padding.
    """
    with process_groups.start(plan, identity) as here:
        training = optimizer.build(plan, model.build(plan, here.device))
        tokens = torch.randint(
            0, 256, (1, 33), generator=torch.Generator().manual_seed(identity.rank)
        )
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(1, 32)}
        batch["position_ids"] = torch.arange(32)[None]
        loop.train_step(
            plan, here, training, [iter([batch] * 8) for _ in training.chunks], StopRequest(), 1, 8
        )
        buffers = [
            buffer
            for chunk in training.chunks
            for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ]
        weights = [parameter for chunk in training.chunks for parameter in chunk.parameters()]
        return {
            "weights": sum(tensor.nbytes for tensor in weights),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "optimizer": sum(tensor.nbytes for tensor in optimizer_tensors(training, weights)),
            "padding": sum(buffer.grad_data.numel() for buffer in buffers)
            - sum(w.numel() for w in weights),
        }


def optimizer_tensors(
    training: optimizer.Training, weights: list[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Moments, and the fp32 copies that are not the weights themselves."""
    memory = {weight.untyped_storage().data_ptr() for weight in weights}
    for part in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in memory:
                    yield parameter
                for value in part.optimizer.state[parameter].values():
                    if torch.is_tensor(value) and value.numel() == parameter.numel() > 1:
                        yield value


BF16 = "trainer.precision=bf16"
STATES = {
    "fp32, DP2": ["trainer.devices=2"],
    "fp32, DP2 without the distributed optimizer": ["trainer.devices=2", PLAIN],
    "bf16, DP2": ["trainer.devices=2", BF16],
    "bf16 gradients, EP2": [EP + "2", BF16, BF16_GRADIENTS],
    "bf16, one rank without the distributed optimizer": [BF16, PLAIN],
    "sgd": [SGD, "optimizer.lr_warmup_steps=0"],
}


@pytest.mark.parametrize("name", STATES)
def test_weights_gradients_and_optimizer_have_the_bytes_that_the_plan_says(name, tmp_path):
    plan = plan_of(*TINY, EP + "1", *STATES[name])
    settings = plan.config.optimizer
    precision = plan.config.trainer.precision
    found = run_ranks(plan.world_size, lambda identity: step_of_bytes(plan, identity), tmp_path)
    whole = sum(plan.rank_parameters[0])
    weight = 4 if precision is Precision.fp32 else 2
    gradient = 4 if precision is Precision.fp32 or settings.grad_reduce_in_fp32 else 2
    for rank in found:
        assert rank["weights"] == weight * whole
        assert rank["gradients"] == gradient * (whole + rank["padding"])
        # Megatron-Core starts a parameter at a multiple of 64 and ends a bucket at one of 128 a
        # rank, so that ranks can cut it evenly: a few numbers here, nothing beside a real model's
        assert 0 <= rank["padding"] < 0.01 * whole
    state = plan.state_bytes - (weight + gradient) * whole
    assert state > 0
    # the padding is nobody's: ranks differ in how much of it they hold, by at most all of it
    slack = 12 * found[0]["padding"] if settings.use_distributed_optimizer else 0
    assert all(abs(rank["optimizer"] - state) <= slack for rank in found)
    assert sum(rank["optimizer"] for rank in found) == state * len(found)
