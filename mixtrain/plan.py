"""Every number that follows from a Config, computed once and frozen. No torch.

Rule: nothing else in the project derives a size from the configuration, and no Plan exists of a Config that breaks a
rule of mixtrain/rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mixtrain import costs
from mixtrain.config import Config, DataKind
from mixtrain.errors import UserError


@dataclass(frozen=True)
class Plan:
    """A legal run. Sizes count ranks unless the name says otherwise."""

    config: Config  # resolved: no size is null that a size follows from
    world_size: int
    data_parallel_size: int  # of the dense parameters, context parallel ranks not counted
    expert_data_parallel_size: int
    dense_shard: int  # ranks one optimizer state of a dense parameter is spread over
    expert_shard: int
    num_microbatches: int  # a step and rank
    tokens_per_step: int
    num_local_experts: int
    layers_per_stage: int
    total_parameters: int
    active_parameters: int
    rank_parameters: tuple[tuple[int, int], ...]  # (dense, expert) on one rank of each pipeline stage
    stage_state_bytes: tuple[int, ...]  # weights, gradients and optimizer state, on one rank of each pipeline stage

    @property
    def state_bytes(self) -> int:
        """Bytes of state on the fullest rank; activations come on top."""
        return max(self.stage_state_bytes)

    @property
    def samples(self) -> tuple[int, int, int]:
        """Sequences that the run reads of the train, validation and test parts. Every validation reads the same."""
        trainer = self.config.trainer
        held_out = trainer.limit_val_batches * trainer.global_batch_size
        test = held_out if float(self.config.data.split.split(",")[2]) else 0
        return trainer.max_steps * trainer.global_batch_size, held_out, test

    @property
    def heaviest_stage(self) -> int:
        return self.stage_state_bytes.index(self.state_bytes)

    @property
    def is_mock(self) -> bool:
        return self.config.data.kind is DataKind.mock


def resolve(config: Config, world_size: int | None = None) -> Config:
    """The Config with the sizes that null leaves open filled in.

    trainer.devices becomes what the layout needs (or what the launcher started, `world_size`), model.num_layers two
    layers a pipeline stage and chunk (so that a stage has an inner boundary), optimizer.lr_decay_steps the run.
    """
    parallel, model, trainer, optimizer = config.parallel, config.model, config.trainer, config.optimizer
    if model.num_layers is None:
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        per_chunk = 2 if parallel.pipeline_model_parallel_size * chunks == 1 else 1
        layers = per_chunk * parallel.pipeline_model_parallel_size * chunks
        model = replace(model, num_layers=layers)
    if trainer.devices is None:
        ranks = world_size or ranks_needed(config)
        trainer = replace(trainer, devices=math.ceil(ranks / trainer.num_nodes))
    if optimizer.lr_decay_steps is None:
        optimizer = replace(optimizer, lr_decay_steps=max(trainer.max_steps, optimizer.lr_warmup_steps + 1))
    return replace(config, model=model, trainer=trainer, optimizer=optimizer)


def ranks_needed(config: Config) -> int:
    """The fewest ranks that hold both grids: TP*PP*CP of the dense parameters, ETP*EP*PP of the experts."""
    return math.lcm(dense_grid(config), expert_grid(config))


def dense_grid(config: Config) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def expert_grid(config: Config) -> int:
    parallel = config.parallel
    return (
        parallel.expert_tensor_parallel_size
        * parallel.expert_model_parallel_size
        * parallel.pipeline_model_parallel_size
    )


def world_size(config: Config) -> int:
    """Ranks of a resolved Config."""
    return config.trainer.devices * config.trainer.num_nodes


def derive(config: Config) -> Plan:
    """The Plan of a resolved Config, by arithmetic alone: sizes that do not divide are rounded down, never below 1."""
    parallel, trainer, model = config.parallel, config.trainer, config.model
    world = world_size(config)
    dp = max(1, world // dense_grid(config))
    edp = max(1, world // expert_grid(config))
    instances = parallel.num_distributed_optimizer_instances
    dense_shard = max(1, dp * parallel.context_parallel_size // instances)
    expert_shard = max(1, edp // instances)
    stages = range(parallel.pipeline_model_parallel_size)
    rank_parameters = tuple(costs.stage_parameters(model, parallel, stage) for stage in stages)
    dense_bytes = costs.bytes_per_parameter(trainer.precision, config.optimizer, dense_shard)
    expert_bytes = costs.bytes_per_parameter(trainer.precision, config.optimizer, expert_shard)
    return Plan(
        config=config,
        world_size=world,
        data_parallel_size=dp,
        expert_data_parallel_size=edp,
        dense_shard=dense_shard,
        expert_shard=expert_shard,
        num_microbatches=max(1, trainer.global_batch_size // (trainer.micro_batch_size * dp)),
        tokens_per_step=trainer.global_batch_size * config.data.seq_length,
        num_local_experts=max(1, model.num_moe_experts // parallel.expert_model_parallel_size),
        layers_per_stage=max(1, model.num_layers // parallel.pipeline_model_parallel_size),
        total_parameters=costs.total_parameters(model),
        active_parameters=costs.active_parameters(model),
        rank_parameters=rank_parameters,
        stage_state_bytes=tuple(
            round(dense * dense_bytes + expert * expert_bytes) for dense, expert in rank_parameters
        ),
    )


def make_plan(config: Config, world_size: int | None = None, known: list[str] | None = None) -> Plan:
    """The Plan of a Config; a UserError lists every rule it breaks, after the problems that are `known` already.

    `world_size`: the ranks a launcher has started, if one has.
    """
    from mixtrain.rules import broken_rules  # the rules read the numbers derived here

    plan = derive(resolve(config, world_size))
    if problems := [*(known or []), *broken_rules(plan)]:
        raise UserError(*problems)
    return plan
