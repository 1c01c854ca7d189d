"""Every number that follows from a Config, computed once and frozen. No torch.

Rule: nothing else in the project derives a size from the configuration, and no Plan exists of a
Config that breaks a rule of config/rules/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from mixtrain.config import (
    activations,
    layout_sensitive,
    lr_schedule,
    memory,
    pipeline_split,
    published_models,
)
from mixtrain.config.choices import DataKind
from mixtrain.config.data_blend import split_weights
from mixtrain.config.key_effects import Change
from mixtrain.config.schema import Config, OptimizerConfig, TrainerConfig


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
    layers: pipeline_split.Stages  # [stage][chunk]
    total_parameters: int
    active_parameters: int
    # (dense, expert) on one rank of each pipeline stage
    rank_parameters: tuple[tuple[int, int], ...]
    # weights, gradients and optimizer state, on one rank of each pipeline stage
    stage_state_bytes: tuple[int, ...]
    stage_activation_bytes: tuple[int, ...]  # at the least, on top of these
    recipe: str | None = field(default=None, kw_only=True)  # its name, where one was given
    changed_mathematics: tuple[Change, ...] = field(default=(), kw_only=True)  # against the recipe
    changed_execution: tuple[Change, ...] = field(default=(), kw_only=True)
    # where the run is not the published model it names, or depends on its layout
    warnings: tuple[str, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of state on the rank that has most of it; activations come on top."""
        return max(self.stage_state_bytes)

    @property
    def samples(self) -> tuple[int, int, int]:
        """Sequences that the run reads of the train, validation and test parts. Every validation reads the same."""
        return self.samples_from(0, 0)

    def samples_from(self, done: int, consumed: int) -> tuple[int, int, int]:
        """The same for a run whose first `done` steps have consumed `consumed` sequences, maybe in other batches."""
        trainer = self.config.trainer
        held_out = trainer.limit_val_batches * trainer.global_batch_size
        test = held_out if split_weights(self.config.data.split)[2] else 0
        return samples_before(trainer, trainer.max_steps, done, consumed), held_out, test

    def microbatches_of(self, batch: int) -> int:
        """Microbatches of a rank in a step of `batch` sequences."""
        return batch // (self.config.trainer.micro_batch_size * self.data_parallel_size)

    @property
    def saves(self) -> bool:
        """The run writes checkpoints."""
        return self.config.checkpoint.save_last or self.config.checkpoint.save_interval is not None

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, all ranks together."""
        return memory.checkpoint_bytes(
            self.total_parameters, self.config.trainer.precision, self.config.optimizer
        )

    @property
    def heaviest_stage(self) -> int:
        return self.stage_state_bytes.index(self.state_bytes)

    @property
    def fullest_stage(self) -> int:
        """The pipeline stage whose ranks need most memory, as far as it is known."""
        return self._least_bytes.index(self.least_bytes)

    @property
    def least_bytes(self) -> int:
        """State and activations of a rank of that stage, at the least."""
        return max(self._least_bytes)

    @property
    def _least_bytes(self) -> list[int]:
        return list(map(sum, zip(self.stage_state_bytes, self.stage_activation_bytes, strict=True)))

    @property
    def is_forced(self) -> bool:
        """The router ignores its own choice: for benchmarks, the model learns nothing of use."""
        return self.config.router.moe_router_force_load_balancing

    @property
    def is_mock(self) -> bool:
        return self.config.data.kind is DataKind.mock


def resolve(config: Config, world_size: int | None = None) -> Config:
    """The Config with the sizes that null leaves open filled in.

    trainer.devices becomes what the layout needs (or what the launcher started, `world_size`),
    model.num_layers as few as the pipeline needs (two where there is none, so that there is an
    inner boundary), the schedule's steps the run's.
    """
    parallel = config.parallel
    model = config.model
    trainer = config.trainer
    if (
        chunks := pipeline_split.chunks_of_layout(parallel)
    ) and not parallel.virtual_pipeline_model_parallel_size:
        parallel = replace(parallel, virtual_pipeline_model_parallel_size=chunks)
    if model.num_layers is None:
        model = replace(model, num_layers=pipeline_split.fewest_layers(parallel))
    if trainer.devices is None:
        ranks = world_size or ranks_needed(config)
        trainer = replace(trainer, devices=math.ceil(ranks / trainer.num_nodes))
    return replace(
        config, parallel=parallel, model=model, trainer=trainer, optimizer=schedule_in_steps(config)
    )


def schedule_in_steps(config: Config) -> OptimizerConfig:
    """The schedule in steps: decay over the run, warm-up as a fraction of the decay, where null leaves them open."""
    optimizer = config.optimizer
    warmup = config.optimizer.lr_warmup_steps
    decay = optimizer.lr_decay_steps or max(config.trainer.max_steps, (warmup or 0) + 1)
    if warmup is None:
        warmup = int((optimizer.lr_warmup_fraction or 0) * decay)
    return replace(optimizer, lr_decay_steps=decay, lr_warmup_steps=warmup)


def batch_size_at(trainer: TrainerConfig, consumed: int) -> int:
    """Sequences of the step that starts after `consumed` ones: Megatron-Core's batch-size ramp-up, or the whole batch.

    As its RampupBatchsizeNumMicroBatchesCalculator: increments at even distances until the ramp's samples are consumed.
    """
    whole = trainer.global_batch_size
    if not trainer.rampup_batch_size:
        return whole
    first, increment, samples = trainer.rampup_batch_size
    increments = (whole - first) // increment if increment else 0
    if consumed > samples or not increments or not samples:
        return whole
    return first + int(consumed / (samples / increments)) * increment


def samples_before(trainer: TrainerConfig, steps: int, done: int = 0, consumed: int = 0) -> int:
    """Sequences that `steps` steps consume, of which `done` have consumed `consumed`."""
    while done < steps:
        size = batch_size_at(trainer, consumed)
        if size == trainer.global_batch_size:
            return consumed + (steps - done) * size
        consumed = consumed + size
        done = done + 1
    return consumed


def ranks_needed(config: Config) -> int:
    """The fewest ranks that hold both grids: TP*PP*CP of the dense parameters, ETP*EP*PP of the experts."""
    return math.lcm(dense_grid(config), expert_grid(config))


def dense_grid(config: Config) -> int:
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


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
    parallel = config.parallel
    trainer = config.trainer
    model = config.model
    world = world_size(config)
    dp = max(1, world // dense_grid(config))
    edp = max(1, world // expert_grid(config))
    instances = parallel.num_distributed_optimizer_instances
    dense_shard = max(1, dp * parallel.context_parallel_size // instances)
    expert_shard = max(1, edp // instances)
    stages = range(parallel.pipeline_model_parallel_size)
    rank_parameters = tuple(memory.stage_parameters(model, parallel, stage) for stage in stages)
    sharding = parallel.data_parallel_sharding_strategy
    dense_bytes = memory.bytes_per_parameter(
        trainer.precision, config.optimizer, dense_shard, sharding
    )
    expert_bytes = memory.bytes_per_parameter(
        trainer.precision, config.optimizer, expert_shard, sharding
    )
    microbatches = max(1, trainer.global_batch_size // (trainer.micro_batch_size * dp))
    layers = pipeline_split.stages(parallel, model.num_layers)
    return Plan(
        config=config,
        world_size=world,
        data_parallel_size=dp,
        expert_data_parallel_size=edp,
        dense_shard=dense_shard,
        expert_shard=expert_shard,
        num_microbatches=microbatches,
        tokens_per_step=trainer.global_batch_size * config.data.seq_length,
        num_local_experts=max(1, model.num_moe_experts // parallel.expert_model_parallel_size),
        layers=layers,
        total_parameters=memory.total_parameters(model),
        active_parameters=memory.active_parameters(model),
        rank_parameters=rank_parameters,
        stage_state_bytes=tuple(
            round(dense * dense_bytes + expert * expert_bytes) for dense, expert in rank_parameters
        ),
        stage_activation_bytes=activations.least_bytes(config, layers, microbatches),
        warnings=(
            *published_models.lint(config),
            *layout_sensitive.warnings(config, dp),
            *lr_schedule.warnings(config),
        ),
    )
