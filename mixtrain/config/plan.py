"""Every number derived from a Config, computed once and frozen. No torch.

Rule: nothing else in the project derives a size from the configuration. planner.py makes plans of
legal configurations only.
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
from mixtrain.config.layout import Layout
from mixtrain.config.schema import Config, OptimizerConfig, TrainerConfig


@dataclass(frozen=True)
class Plan:
    """A run. Sizes count ranks unless the name says otherwise."""

    config: Config  # resolved: sizes that other sizes depend on are not null
    world_size: int
    layout: Layout
    dense_shard: int  # ranks that share the optimizer state of a dense parameter
    expert_shard: int
    num_microbatches: int  # per step and rank
    tokens_per_step: int
    num_local_experts: int
    layers: pipeline_split.Stages  # [stage][chunk]
    total_parameters: int
    active_parameters: int
    # (dense, expert) on one rank of each pipeline stage
    rank_parameters: tuple[tuple[int, int], ...]
    # weights, gradients and optimizer state, on one rank of each pipeline stage
    stage_state_bytes: tuple[int, ...]
    stage_activation_bytes: tuple[int, ...]  # a lower bound, in addition to the state
    recipe: str | None = field(default=None, kw_only=True)  # its name
    # differences from the recipe
    changed_mathematics: tuple[Change, ...] = field(default=(), kw_only=True)
    changed_execution: tuple[Change, ...] = field(default=(), kw_only=True)
    # differences from the published model, dependence on the layout, an unfinished warm-up
    warnings: tuple[str, ...]

    @property
    def data_parallel_size(self) -> int:
        return self.layout.dp

    @property
    def expert_data_parallel_size(self) -> int:
        return self.layout.edp

    @property
    def state_bytes(self) -> int:
        """Bytes of state on the rank with the largest state, without activations."""
        return max(self.stage_state_bytes)

    @property
    def samples(self) -> tuple[int, int, int]:
        """Sequences that the run reads of train, validation (every time the same) and test."""
        return self.samples_from(0, 0)

    def samples_from(self, done: int, consumed: int) -> tuple[int, int, int]:
        """Return `samples` of a run whose first `done` steps have consumed `consumed` sequences."""
        trainer = self.config.trainer
        held_out = trainer.limit_val_batches * trainer.global_batch_size
        test = held_out if split_weights(self.config.data.split)[2] else 0
        return samples_before(trainer, trainer.max_steps, done, consumed), held_out, test

    def microbatches_of(self, batch: int) -> int:
        """Return a rank's microbatches in a step of `batch` sequences."""
        return batch // (self.config.trainer.micro_batch_size * self.data_parallel_size)

    @property
    def saves(self) -> bool:
        """Whether the run writes checkpoints."""
        return self.config.checkpoint.save_last or self.config.checkpoint.save_interval is not None

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint, of all ranks together."""
        return memory.checkpoint_bytes(
            self.total_parameters, self.config.trainer.precision, self.config.optimizer
        )

    @property
    def heaviest_stage(self) -> int:
        return self.stage_state_bytes.index(self.state_bytes)

    @property
    def fullest_stage(self) -> int:
        """The pipeline stage whose ranks have the most state and least activations."""
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
        """Whether the router chooses experts at random, for benchmarks."""
        return self.config.router.moe_router_force_load_balancing

    @property
    def is_mock(self) -> bool:
        return self.config.data.kind is DataKind.mock


def resolve(config: Config, world_size: int | None = None) -> Config:
    """Return the Config with numbers for the sizes that are null.

    trainer.devices: what the layout needs, or what the launcher started (`world_size`).
    model.num_layers: as few as the pipeline needs; two without a pipeline, for an inner boundary.
    The schedule's steps: those of the run.
    """
    parallel = config.parallel
    model = config.model
    trainer = config.trainer
    chunks = pipeline_split.chunks_of_layout(parallel)
    if chunks and not parallel.virtual_pipeline_model_parallel_size:
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
    """Return the schedule in steps; null: decay over the run, warm-up as a fraction of it."""
    optimizer = config.optimizer
    warmup = config.optimizer.lr_warmup_steps
    decay = optimizer.lr_decay_steps or max(config.trainer.max_steps, (warmup or 0) + 1)
    if warmup is None:
        warmup = int((optimizer.lr_warmup_fraction or 0) * decay)
    return replace(optimizer, lr_decay_steps=decay, lr_warmup_steps=warmup)


def batch_size_at(trainer: TrainerConfig, consumed: int) -> int:
    """Return the sequences of the step that starts after `consumed` sequences.

    As Megatron-Core's RampupBatchsizeNumMicroBatchesCalculator: the batch grows by increments at
    even distances until the samples of the ramp-up are consumed.
    """
    full = trainer.global_batch_size
    if not trainer.rampup_batch_size:
        return full
    first, increment, samples = trainer.rampup_batch_size
    increments = (full - first) // increment if increment else 0
    if consumed > samples or not increments or not samples:
        return full
    return first + int(consumed / (samples / increments)) * increment


def samples_before(trainer: TrainerConfig, steps: int, done: int = 0, consumed: int = 0) -> int:
    """Return the sequences of `steps` steps, of which the first `done` consumed `consumed`."""
    while done < steps:
        size = batch_size_at(trainer, consumed)
        if size == trainer.global_batch_size:
            return consumed + (steps - done) * size
        consumed += size
        done += 1
    return consumed


def ranks_needed(config: Config) -> int:
    """Return the smallest world size for both grids: TP*PP*CP (dense) and ETP*EP*PP (experts)."""
    layout = Layout.of(config)
    return math.lcm(layout.dense_grid, layout.expert_grid)


def world_size(config: Config) -> int:
    """Return the ranks of a resolved Config."""
    return config.trainer.devices * config.trainer.num_nodes


def derive(config: Config) -> Plan:
    """Compute the Plan of a resolved Config, legal or not; round quotients down, to at least 1."""
    parallel = config.parallel
    trainer = config.trainer
    model = config.model
    layout = Layout.of(config)
    instances = parallel.num_distributed_optimizer_instances
    dense_shard = max(1, layout.dp * layout.cp // instances)
    expert_shard = max(1, layout.edp // instances)
    rank_parameters = tuple(
        memory.stage_parameters(model, parallel, stage) for stage in range(layout.pp)
    )
    sharding = parallel.data_parallel_sharding_strategy
    dense_bytes = memory.bytes_per_parameter(
        trainer.precision, config.optimizer, dense_shard, sharding
    )
    expert_bytes = memory.bytes_per_parameter(
        trainer.precision, config.optimizer, expert_shard, sharding
    )
    microbatches = max(1, trainer.global_batch_size // (trainer.micro_batch_size * layout.dp))
    layers = pipeline_split.stages(parallel, model.num_layers)
    return Plan(
        config=config,
        world_size=world_size(config),
        layout=layout,
        dense_shard=dense_shard,
        expert_shard=expert_shard,
        num_microbatches=microbatches,
        tokens_per_step=trainer.global_batch_size * config.data.seq_length,
        num_local_experts=max(1, model.num_moe_experts // layout.ep),
        layers=layers,
        total_parameters=memory.total_parameters(model),
        active_parameters=memory.active_parameters(model),
        rank_parameters=rank_parameters,
        stage_state_bytes=tuple(
            round(dense * dense_bytes + expert * expert_bytes) for dense, expert in rank_parameters
        ),
        stage_activation_bytes=activations.least_bytes(config, layers, microbatches),
        warnings=(
            *published_models.warnings(config),
            *layout_sensitive.warnings(config),
            *lr_schedule.warnings(config),
        ),
    )
