"""What one rank measures of two training steps, and how its parts differ from those of the one-rank run."""

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
# a choice of experts nearer to a tie could fall the other way where sums are taken in another order
MARGIN = 1e-4
MASKED = 0.1  # of the tokens
SEEDS = 100  # tried for a batch without such a choice


class ChoiceMargin(TorchFunctionMode):
    """Within the block, remembers how near any top-k choice was to another: its last chosen logit less the next one.

    Of scores, which are never negative, it takes logarithms: what shifts a logit shifts those as much at the most. It
    sees every choice that the installed router makes: of experts, of groups of experts, of tokens under a capacity.
    Of a balanced assignment it takes by how much the next best one is worse.
    """

    smallest = math.inf

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.topk, torch.Tensor.topk):
            self._look(*args, **kwargs)
        result = function(*args, **kwargs)
        if function is balanced_assignment:
            self.smallest = min(self.smallest, assignment_margin(args[0], result))
        return result

    def _look(self, values: torch.Tensor, k: int, dim: int = -1, **_: object) -> None:
        if k >= values.shape[dim]:
            return
        best = values.detach().double().topk(k + 1, dim=dim).values
        if (values >= 0).all():
            best = best.log()
        last = best.select(dim, k - 1)
        following = best.select(dim, k)
        # a capacity looks at tokens that were never sent, too
        differences = (last - following)[last > -math.inf]
        if differences.numel():
            self.smallest = min(self.smallest, differences.min().item())


def reference(plan: Plan, identity: Identity, file: Path) -> dict:
    """The one-rank run: its figures, with the first seed whose choices all have MARGIN; its tensors go to `file`.

    Gives {seed, margin, tried, largest_gradients, lm_loss, balance, grad_norm}, the last three a number a step.
    """
    with process_groups.start(plan, identity) as here:
        for tried in range(SEEDS):
            seeded = replace(plan, config=replace(plan.config, seed=plan.config.seed + tried))
            with ChoiceMargin() as margin:
                figures, gradients, parameters = two_steps(seeded, here)
            if margin.smallest > MARGIN:
                break
        wholes = {}
        for name, (chunks, held) in {"gradients": gradients, "parameters": parameters}.items():
            with shards.standing_in(chunks, held.__getitem__):
                wholes[name] = shards.read(seeded, chunks)
        torch.save(wholes, file)
    return {
        "seed": seeded.config.seed,
        "margin": margin.smallest,
        "tried": tried + 1,
        "largest_gradients": {
            key: _largest(key, whole) for key, whole in wholes["gradients"].items()
        },
        **figures,
    }


def _largest(key: str, whole: torch.Tensor) -> list[float]:
    """The largest absolute entry of each layer of a stacked tensor, or of the one that is not stacked."""
    layers = whole if key.startswith(tensor_schema.LAYER) else whole[None]
    return layers.flatten(1).abs().amax(dim=1).tolist()


def measure(plan: Plan, identity: Identity, file: Path) -> dict:
    """The run at the plan's layout, on one of its ranks: `differences` from the one-rank run's tensors in `file`."""
    wholes = torch.load(file, mmap=True, weights_only=True)
    with process_groups.start(plan, identity) as here:
        return differences(plan, here, wholes)


def differences(
    plan: Plan, here: process_groups.Ranks, wholes: dict[str, dict[str, torch.Tensor]]
) -> dict:
    """Two steps in the groups that there are: this rank's figures, and a line for each of its parts of a tensor.

    A line is [key, layer, part, elements, difference of the gradient, of the parameter], differences being the largest
    absolute ones.
    """
    figures, gradients, parameters = two_steps(plan, here)
    lines = {}
    for column, (chunks, held) in enumerate((gradients, parameters)):
        whole = wholes["parameters" if column else "gradients"]
        with shards.standing_in(chunks, held.__getitem__):
            for shard in (shard for chunk in chunks for shard in shards.shards(chunk)):
                part = str((shard.numbers, [(cut.start, cut.stop) for cut in shard.cut]))
                line = lines.setdefault(
                    (shard.key, part),
                    [
                        shard.key,
                        shard.numbers[0] if shard.numbers else None,
                        part,
                        shard.data.numel(),
                        0.0,
                        0.0,
                    ],
                )
                difference = (shard.data.cpu() - shard.of(whole[shard.key])).abs().max().item()
                line[4 + column] = difference if math.isfinite(difference) else 1e30
    return {**figures, "parts": list(lines.values())}


Held = tuple[list[torch.nn.Module], dict[torch.nn.Parameter, torch.Tensor]]


def two_steps(plan: Plan, here: process_groups.Ranks) -> tuple[dict, Held, Held]:
    """(figures a step, gradients of the first step, parameters after the last), the latter by parameter."""
    training = optimizer.build(plan, model.build(plan, here.device))
    load = ExpertLoad(plan, training.chunks, here.device)
    streams = [batches(plan) for _ in training.chunks]
    figures: dict[str, list] = {"lm_loss": [], "balance": [], "grad_norm": []}
    gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
    before_step = training.optimizer.step

    def remember_gradients_then_step():
        if not gradients:
            gather_gradients(training)
            gradients.update(
                {parameter: parameter.main_grad.clone() for parameter in parameters_of(training)}
            )
        return before_step()

    training.optimizer.step = remember_gradients_then_step
    for step in range(1, STEPS + 1):
        load.clear()
        batch = plan.config.trainer.global_batch_size
        loss, norm, _ = loop.train_step(plan, here, training, streams, StopRequest(), step, batch)
        balance = collect_balancing_loss(plan, plan.num_microbatches, here.device)
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
    """With a distributed optimizer a rank has reduced only its shard of the gradients: fetch those of the others."""
    for chunk in training.chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buckets in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
            group = buckets.intra_distributed_optimizer_instance_group
            for bucket in buckets.buckets:
                mine = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def batches(plan: Plan) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's microbatches, dealt out as mixtrain.data.batches does; every step the same samples.

    Some tokens are masked, in each sequence others: a layout must not change what a token weighs.
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
    """(tokens [seq_length + 1], loss mask [seq_length]) of a sample.

    A microbatch weighs its tokens alike, and each microbatch weighs the same: where a layout
    changes how many sequences one has, each sequence has as many tokens.
    """
    length = plan.config.data.seq_length
    generator = torch.Generator().manual_seed(1000 * plan.config.seed + number)
    tokens = torch.randint(0, plan.config.model.vocab_size, (length + 1,), generator=generator)
    chance = torch.rand(length, generator=generator)
    if layout_sensitive.counts_over_a_step(plan.config):
        return tokens, (chance.argsort() >= MASKED * length).float()
    return tokens, (chance < 1 - MASKED).float()
