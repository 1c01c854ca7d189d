"""The repeated work that a benchmark measures, of a plan on one random batch.

Rule: mixtrain's work is done by the functions of a training run. The time of saving includes fsync.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mixtrain.config.choices import Accelerator, Precision
from mixtrain.config.plan import Plan
from mixtrain.data.batches import IDS
from mixtrain.engine.compat.prepare import prepare
from mixtrain.system.rank_identity import Identity


@dataclass(frozen=True)
class Work:
    """`once` does the work and returns what it computed; `amount` is its size (tokens, bytes)."""

    once: Callable[[], dict[str, float]]  # "seconds" in the result replaces the measured time
    amount: float
    # waits until all earlier work has finished, on this rank and the others
    wait: Callable[[], None] = lambda: None
    # the norm of the gradients that `once` leaves; None if its result has it or it is not known
    norm: Callable[[], float] | None = None


def microbatches(plan: Plan, rank: int = 0, size: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the microbatches of data-parallel rank `rank` of `size`: random tokens from the seed.

    All ranks together have the same global batch at every size.
    """
    trainer = plan.config.trainer
    length = plan.config.data.seq_length
    generator = torch.Generator().manual_seed(plan.config.seed)
    shape = (trainer.global_batch_size, length + 1)
    tokens = torch.randint(0, plan.config.model.vocab_size, shape, generator=generator)
    for rows in tokens[rank::size].split(trainer.micro_batch_size):
        yield {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "loss_mask": torch.ones(len(rows), length),
            "position_ids": torch.arange(length).repeat(len(rows), 1),
            IDS: torch.zeros(len(rows), dtype=torch.int64),
        }


class RepeatedBatch:
    """An endless iterable of the rank's microbatches of one batch."""

    def __init__(self, plan: Plan):
        from megatron.core.parallel_state import (
            get_data_parallel_rank,
            get_data_parallel_world_size,
        )

        ranks = get_data_parallel_rank(), get_data_parallel_world_size()
        self.batch = list(microbatches(plan, *ranks))

    def __iter__(self):
        while True:
            yield from self.batch


def norm_of(gradients: Iterable[torch.Tensor]) -> float:
    return sum(gradient.double().pow(2).sum().item() for gradient in gradients) ** 0.5


@contextlib.contextmanager
def started(plan: Plan, identity: Identity, begin: Callable[[], None]) -> Iterator[Any]:
    """Yield this rank, with Megatron-Core initialized for the plan's device.

    `begin` is called after all imports, before the model is built.
    """
    prepare(plan.config.trainer.accelerator)
    from mixtrain.engine import process_groups
    from mixtrain.training import loop  # noqa: F401  (imports all of Megatron-Core that a step needs)

    begin()
    with process_groups.start(plan, identity) as ranks:
        yield ranks


def wait_for_ranks() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def optimizer_steps(plan: Plan, ranks: Any) -> Work:
    """Return the work of whole optimizer steps, taken by the training loop, on the same batch."""
    once, _ = step_of(plan, ranks)
    return Work(once, plan.tokens_per_step, wait_for_ranks)


def step_of(plan: Plan, ranks: Any) -> tuple[Callable[[], dict[str, float]], Any]:
    """Return (a function that takes a step as the loop does, the Training that it changes)."""
    from mixtrain.checkpoint.state import RunState
    from mixtrain.engine import model, optimizer
    from mixtrain.training import loop
    from mixtrain.training.bad_steps import norm_check
    from mixtrain.training.signals import StopRequest

    check_norm = norm_check(plan, ranks.device)
    training = optimizer.build(plan, model.build(plan, ranks.device), check_norm)
    logs = SimpleNamespace(say=print)
    run = loop.Loop(plan, ranks, training, {"train": RepeatedBatch(plan)}, logs, RunState())
    stop = StopRequest()

    def once() -> dict[str, float]:
        metrics, _ = run.take_step(run.state.step + 1, stop)
        if metrics["lm_loss"] is None:
            raise RuntimeError(
                f"step {metrics['step']} was skipped, and this benchmark measures no skipped steps"
            )
        return {"sum": metrics["lm_loss"], "tokens": 1, "norm": metrics["grad_norm"]}

    return once, training


def passes(plan: Plan, ranks: Any) -> Work:
    """Return the work of forward and backward, after the gradient buffers are set to zero.

    The norm is only available on one rank.
    """
    from mixtrain.engine import model, optimizer
    from mixtrain.training import loop

    chunks = optimizer.wrap_for_data_parallel(plan, model.build(plan, ranks.device))
    optimizer.set_schedule_callbacks(plan, chunks, optimizer=None)
    training = optimizer.Training(chunks, optimizer=None, scheduler=None)
    data = [iter(RepeatedBatch(plan)) for _ in chunks]
    batch = plan.config.trainer.global_batch_size

    def once() -> dict[str, float]:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        total, tokens = loop.run_microbatches(
            plan, ranks, training, data, batch, forward_only=False
        )
        return {"sum": total, "tokens": tokens}

    def norm() -> float:
        return norm_of(weight.main_grad for chunk in chunks for weight in chunk.parameters())

    return Work(once, plan.tokens_per_step, wait_for_ranks, norm if plan.world_size == 1 else None)


def transformers_passes(plan: Plan, overrides: dict[str, str], begin: Callable[[], None]) -> Work:
    """Return the work of forward and backward of transformers' model, with the same weights.

    Its public classes are unchanged, with their fastest settings for training unless `overrides`
    names others: PyTorch's attention, no cache, no router logits, gradients set to None.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from mixtrain.engine import weight_init
    from mixtrain.interop.convert import hf_config
    from mixtrain.interop.convert.weights import to_hugging_face

    config = plan.config
    is_gpu = config.trainer.accelerator is Accelerator.gpu
    device = torch.device("cuda" if is_gpu else "cpu")
    dtype = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[
        config.trainer.precision
    ]
    begin()
    values = hf_config.to_hugging_face(config) | {"attn_implementation": "sdpa"} | overrides
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=dtype)
    weights = to_hugging_face(config, weight_init.initial_tensors(plan, dtype), "fused")
    model.load_state_dict(weights, strict=config.model.untie_embeddings_and_output_weights)
    del weights
    model.train()
    inputs = [
        {"input_ids": batch["tokens"].to(device), "shift_labels": batch["labels"].to(device)}
        for batch in microbatches(plan)
    ]

    def once() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        losses = []
        for tensors in inputs:
            # `labels` requests a loss; `shift_labels` are labels that are already shifted
            output = model(**tensors, labels=tensors["shift_labels"], use_cache=False)
            loss = output.loss / len(inputs)
            loss.backward()
            losses.append(loss.detach())
        return {"sum": torch.stack(losses).sum().item(), "tokens": 1}

    wait = torch.cuda.synchronize if is_gpu else lambda: None
    return Work(
        once, plan.tokens_per_step, wait, lambda: norm_of(each.grad for each in model.parameters())
    )


def checkpoint_saves(plan: Plan, ranks: Any, folder: Path) -> Work:
    """Return the work of saving a model that has taken a step; one checkpoint is kept.

    With checkpoint.async_save the time is that for which training is blocked.
    """
    plan = replace(plan, config=replace(plan.config, run_dir=str(folder)))
    step, training = step_of(plan, ranks)
    from mixtrain.checkpoint.save import Saver
    from mixtrain.checkpoint.state import RunState

    step()
    saver = Saver(plan, ranks, training, lambda _: None)
    numbers = itertools.count(1)

    def once() -> dict[str, float]:
        began = time.perf_counter()
        saver.save(RunState(step=next(numbers)))
        blocked_seconds = time.perf_counter() - began
        while saver.pending:
            step()
            began = time.perf_counter()
            saver.poll()
            blocked_seconds += time.perf_counter() - began
        return {"seconds": blocked_seconds}

    return Work(once, plan.checkpoint_bytes)


def plain_writes(plan: Plan, folder: Path, files: int) -> Work:
    """Return the work of writing a checkpoint's bytes to plain files, two at a time like a rank."""
    data = memoryview(os.urandom(1 << 26))
    size = plan.checkpoint_bytes // files
    paths = [folder / f"plain_{number}" for number in range(files)]

    def write(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            remaining = size
            while remaining:
                remaining -= file.write(data[: min(remaining, len(data))])
            os.fsync(file.fileno())

    def once() -> dict[str, float]:
        began = time.perf_counter()
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(write, paths))
        seconds = time.perf_counter() - began
        for path in paths:
            path.unlink()
        return {"seconds": seconds}

    return Work(once, size * files)
