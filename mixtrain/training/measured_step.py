"""Measure two training steps of a rank and compare its shards with the one-rank run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode

from mixtrain.config import layout_sensitive, tensor_schema
from mixtrain.config.plan import Plan
from mixtrain.engine import model, optimizer, process_groups, shards
from mixtrain.engine.layers.balanced_router import assignment_margin, balanced_assignment
from mixtrain.engine.moe_metrics import ExpertLoad, collect_balancing_loss
from mixtrain.engine.optimizer import Training
from mixtrain.system.rank_identity import Identity
from mixtrain.training import loop
from mixtrain.training.signals import StopRequest

STEPS = 2
# an expert choice nearer to a tie could flip when sums are taken in another order
MARGIN = 1e-4
MASKED_SHARE = 0.1  # of the tokens
SEEDS = 100  # tried to find a batch without such a choice


class ChoiceMargin(TorchFunctionMode):
    """Records the smallest margin of any top-k choice: last chosen logit less the next one.

    For scores, which are never negative, it compares logarithms: a change of a logit changes those
    by at most as much. It sees every choice that the installed router makes: experts, groups of
    experts, tokens under a capacity. For a balanced assignment it is the distance to the next best.
    """

    smallest = math.inf

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.topk, torch.Tensor.topk):
            self._record(*args, **kwargs)
        result = function(*args, **kwargs)
        if function is balanced_assignment:
            self.smallest = min(self.smallest, assignment_margin(args[0], result))
        return result

    def _record(self, values: torch.Tensor, k: int, dim: int = -1, **_: object) -> None:
        if k >= values.shape[dim]:
            return
        best = values.detach().double().topk(k + 1, dim=dim).values
        if (values >= 0).all():
            best = best.log()
        last = best.select(dim, k - 1)
        following = best.select(dim, k)
        # -inf: with a capacity, top-k also ranks tokens that were never routed to the expert
        differences = (last - following)[last > -math.inf]
        if differences.numel():
            self.smallest = min(self.smallest, differences.min().item())


def reference(plan: Plan, identity: Identity, file: Path) -> dict:
    """Take the steps on one rank with the first seed whose choices all have MARGIN.

    Returns {seed, margin, tried, largest_gradients, lm_loss, balance, grad_norm}, the last three
    one number per step. Writes `file`: {"gradients", "parameters"}: the full tensors by key.
    """
    with process_groups.start(plan, identity) as ranks:
        for tried in range(SEEDS):
            seeded = replace(plan, config=replace(plan.config, seed=plan.config.seed + tried))
            with ChoiceMargin() as margin:
                figures, gradients, parameters = two_steps(seeded, ranks)
            if margin.smallest > MARGIN:
                break
        tensors = {}
        for name, (chunks, values) in {"gradients": gradients, "parameters": parameters}.items():
            with shards.substitute_parameters(chunks, values.__getitem__):
                tensors[name] = shards.read(seeded, chunks)
        torch.save(tensors, file)
    return {
        "seed": seeded.config.seed,
        "margin": margin.smallest,
        "tried": tried + 1,
        "largest_gradients": {
            key: _largest(key, gradient) for key, gradient in tensors["gradients"].items()
        },
        **figures,
    }


def _largest(key: str, tensor: torch.Tensor) -> list[float]:
    """Return the largest absolute entry of each layer; one if there is no layer axis."""
    layers = tensor if key.startswith(tensor_schema.LAYER) else tensor[None]
    return layers.flatten(1).abs().amax(dim=1).tolist()


def measure(plan: Plan, identity: Identity, file: Path) -> dict:
    """Return `differences` of this rank, at the plan's layout, from the reference in `file`."""
    reference_tensors = torch.load(file, mmap=True, weights_only=True)
    with process_groups.start(plan, identity) as ranks:
        return differences(plan, ranks, reference_tensors)


def differences(
    plan: Plan, ranks: process_groups.Ranks, reference_tensors: dict[str, dict[str, torch.Tensor]]
) -> dict:
    """Take two steps in the current process groups; return this rank's figures and a row per shard.

    A row is [key, layer, shard, elements, largest absolute difference of the gradient, of the
    parameter].
    """
    figures, gradients, parameters = two_steps(plan, ranks)
    rows = {}
    for column, (chunks, values) in enumerate((gradients, parameters)):
        tensors = reference_tensors["parameters" if column else "gradients"]
        with shards.substitute_parameters(chunks, values.__getitem__):
            for shard in (shard for chunk in chunks for shard in shards.shards(chunk)):
                name = str((shard.numbers, [(axis.start, axis.stop) for axis in shard.slices]))
                layer = shard.numbers[0] if shard.numbers else None
                new_row = [shard.key, layer, name, shard.data.numel(), 0.0, 0.0]
                row = rows.setdefault((shard.key, name), new_row)
                difference = (shard.data.cpu() - shard.of(tensors[shard.key])).abs().max().item()
                row[4 + column] = difference if math.isfinite(difference) else 1e30
    return {**figures, "parts": list(rows.values())}


Values = tuple[list[torch.nn.Module], dict[torch.nn.Parameter, torch.Tensor]]


def two_steps(plan: Plan, ranks: process_groups.Ranks) -> tuple[dict, Values, Values]:
    """Take STEPS steps; return (figures per step, first gradients, last parameters).

    Gradients and parameters as (model chunks, tensor by parameter).
    """
    training = optimizer.build(plan, model.build(plan, ranks.device))
    load = ExpertLoad(plan, training.chunks, ranks.device)
    streams = [batches(plan) for _ in training.chunks]
    figures: dict[str, list] = {"lm_loss": [], "balance": [], "grad_norm": []}
    gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
    optimizer_step = training.optimizer.step

    def record_gradients_then_step():
        if not gradients:
            gather_gradients(training)
            gradients.update(
                {parameter: parameter.main_grad.clone() for parameter in parameters_of(training)}
            )
        return optimizer_step()

    training.optimizer.step = record_gradients_then_step
    for step in range(1, STEPS + 1):
        load.clear()
        batch = plan.config.trainer.global_batch_size
        loss, norm, _ = loop.train_step(plan, ranks, training, streams, StopRequest(), step, batch)
        balance = collect_balancing_loss(plan, plan.num_microbatches, ranks.device)
        for name, value in (("lm_loss", loss), ("balance", balance), ("grad_norm", norm)):
            figures[name].append(value)
    optimizer.gather_parameters(plan, training)
    chunks = training.chunks
    return (
        figures,
        (chunks, gradients),
        (chunks, {parameter: parameter.data for parameter in parameters_of(training)}),
    )


def parameters_of(training: Training) -> Iterator[torch.nn.Parameter]:
    return (parameter for chunk in training.chunks for parameter in chunk.parameters())


def gather_gradients(training: Training) -> None:
    """Gather the reduced gradients: with a distributed optimizer a rank has only its shard."""
    for chunk in training.chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buckets in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
            group = buckets.intra_distributed_optimizer_instance_group
            for bucket in buckets.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def batches(plan: Plan) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's microbatches, ordered as in mixtrain.data.batches; all steps are equal.

    Each sequence masks other tokens: a layout must not change the weight of a token.
    """
    dp = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    micro = plan.config.trainer.micro_batch_size
    size = plan.config.trainer.global_batch_size
    length = plan.config.data.seq_length
    for first in range(rank * micro, STEPS * size, dp * micro):
        samples = [_sample(plan, number % size) for number in range(first, first + micro)]
        yield {
            "tokens": torch.stack([tokens[:-1] for tokens, _ in samples]),
            "labels": torch.stack([tokens[1:] for tokens, _ in samples]),
            "loss_mask": torch.stack([mask for _, mask in samples]),
            "position_ids": torch.arange(length).expand(micro, length),
        }


def _sample(plan: Plan, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens [seq_length + 1], loss mask [seq_length]) of a sample.

    The loss weighs microbatches equally, and tokens equally within one. So where a layout changes
    the sequences per microbatch, every sequence has the same number of unmasked tokens.
    """
    length = plan.config.data.seq_length
    generator = torch.Generator().manual_seed(1000 * plan.config.seed + number)
    tokens = torch.randint(0, plan.config.model.vocab_size, (length + 1,), generator=generator)
    chance = torch.rand(length, generator=generator)
    if layout_sensitive.counts_over_a_step(plan.config):
        return tokens, (chance.argsort() >= MASKED_SHARE * length).float()
    return tokens, (chance < 1 - MASKED_SHARE).float()
