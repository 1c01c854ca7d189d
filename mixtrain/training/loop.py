"""The training loop: forward and backward by Megatron-Core's schedules, one optimizer step, what it says of it.

Rule: every number that leaves this file is the same on every rank, and every decision (stop, fail) is taken by all
ranks in the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from mixtrain.checkpoint.save import Saver
from mixtrain.checkpoint.state import RunState
from mixtrain.config.plan import Plan, batch_size_at
from mixtrain.data.batches import KEYS
from mixtrain.engine.layers.context import local_part
from mixtrain.engine.moe_metrics import (
    ExpertLoad,
    collect_balancing_loss,
    expert_bias,
    expert_biases,
    token_drop_rate,
)
from mixtrain.engine.optimizer import Training, parameters_gathered
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import Fault
from mixtrain.training.bad_steps import (
    BadNorm,
    BadStep,
    BadSteps,
    guard_norm,
    ranks_where,
    ranks_with_bad_gradients,
)
from mixtrain.training.logs import Logs
from mixtrain.training.sample_digest import SampleIds, digest
from mixtrain.training.signals import StopRequest
from mixtrain.training.watchdog import heartbeat


class Loop:
    """The steps of a run, from where `begun` is."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        training: Training,
        data: dict[str, Iterable],
        logs: Logs,
        begun: RunState,
    ):
        self.plan = plan
        self.ranks = ranks
        self.training = training
        self.data = data
        self.logs = logs
        self.state = begun
        self.load = ExpertLoad(plan, training.chunks, ranks.device)
        self.sample_ids = SampleIds()
        self.microbatches = [iter(data["train"]) for _ in training.chunks]
        self.microbatches[0] = self.sample_ids.watch(
            self.microbatches[0]
        )  # every chunk reads the same
        self.bad_steps = BadSteps(
            plan, ranks, logs.say, begun.skipped_steps, begun.skipped_in_a_row
        )
        guard_norm(plan, training, ranks.device)

    def run(self, stop: StopRequest, saver: Saver) -> RunState:
        """Train until trainer.max_steps or until asked to stop; where the run is then."""
        trainer = self.plan.config.trainer
        if self.state.validation_due:
            self.validate(self.state.step)
        for step in range(self.state.step + 1, trainer.max_steps + 1):
            heartbeat("start", step)
            facts, stopping = self.take(step, stop)
            finished = step == trainer.max_steps
            due = step == 1 or step % trainer.log_every_n_steps == 0
            if due or finished or stopping:
                self.log(facts, last=not due)
            due = step % trainer.val_check_interval == 0 and "validation" in self.data
            # whoever asked to stop is waiting
            if (due or (finished and "validation" in self.data)) and not stopping:
                self.validate(step, last=not due)
            self.state = replace(self.state, validation_due=due and stopping)
            saver.after_step(self.state, ending=finished or stopping)
            if stopping:
                break
        return self.state

    def take(self, step: int, stop: StopRequest) -> tuple[dict[str, Any], bool]:
        """Take a step, or skip a bad one: (what is known of it without asking other ranks, whether to stop)."""
        self.load.clear()
        self.sample_ids.clear()
        batch = batch_size_at(self.plan.config.trainer, self.state.consumed_samples)
        learning_rate = self.training.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        lm_loss = grad_norm = None
        try:
            lm_loss, grad_norm, stopping = train_step(
                self.plan, self.ranks, self.training, self.microbatches, stop, step, batch
            )
            self.bad_steps.good()
        except BadStep as bad:
            self.bad_steps.meet(
                bad, self.sample_ids.gather(self.ranks.device), self.load.not_finite(self.ranks)
            )
            stopping = bad.stopping
        seconds = time.perf_counter() - started
        self.state = replace(
            self.state,
            step=step,
            consumed_samples=self.state.consumed_samples + batch,
            schedule_steps=self.training.scheduler.num_steps,
            skipped_steps=self.bad_steps.skipped,
            skipped_in_a_row=self.bad_steps.in_a_row,
        )
        facts = {
            "step": step,
            "lm_loss": lm_loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }
        speed = {
            "tokens_per_second": batch * self.plan.config.data.seq_length / seconds,
            "step_seconds": seconds,
        }
        return facts | speed | {"batch": batch}, stopping

    def log(self, facts: dict[str, Any], last: bool) -> None:
        """Log a step, with what all ranks know of it together."""
        batch = facts.pop("batch")
        counts = self.load.collect()
        self.logs.step(
            last=last,
            **facts,
            load_balancing_loss=collect_balancing_loss(
                self.plan, self.plan.microbatches_of(batch), self.ranks.device
            ),
            consumed_samples=self.state.consumed_samples,
            skipped_steps=self.state.skipped_steps,
            sample_digest=digest(self.sample_ids.gather(self.ranks.device)),
            tokens_per_expert=counts,
            **token_drop_rate(self.plan, counts, batch),
            **self.load.balanced_choices_changed(self.plan, batch),
            **expert_bias(self.plan, self.training.chunks, self.ranks.device),
        )

    def validate(self, step: int, last: bool = False) -> None:
        """The loss of the held-out data after `step` steps, logged; `last`: only because the run ends there."""
        loss = evaluate(self.plan, self.ranks, self.training, self.data["validation"], step)
        self.logs.validation(step=step, val_loss=loss, last=last)


def train_step(
    plan: Plan,
    ranks: Ranks,
    training: Training,
    microbatches: list[Iterator],
    stop: StopRequest,
    step: int,
    batch: int,
) -> tuple[float, float, bool]:
    """One optimizer step on `batch` sequences.

    Gives (LM loss per token, gradient norm before clipping, whether any rank was asked to stop).
    BadStep on all ranks, with nothing changed, if it should not be taken.
    """
    # finalize_model_grads moves them
    biases = [bias.clone() for bias in expert_biases(training.chunks)]
    try:
        return _step(plan, ranks, training, microbatches, stop, step, batch)
    except BadStep:
        for bias, before in zip(expert_biases(training.chunks), biases, strict=True):
            bias.copy_(before)
        raise


def _step(
    plan: Plan,
    ranks: Ranks,
    training: Training,
    microbatches: list[Iterator],
    stop: StopRequest,
    step: int,
    batch: int,
) -> tuple[float, float, bool]:
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
        chunk.train()
    training.optimizer.zero_grad()
    loss, tokens = run_microbatches(plan, ranks, training, microbatches, batch, forward_only=False)
    bad = not math.isfinite(loss)
    facts = torch.tensor(
        [0.0 if bad else loss, tokens, float(bad), float(stop.signal is not None)],
        dtype=torch.float64,
        device=ranks.device,
    )
    torch.distributed.all_reduce(facts)
    loss_sum, token_sum, bad_ranks, stop_ranks = facts.tolist()
    if bad_ranks:
        raise BadStep(step, "lm_loss", "not finite", ranks_where(bad, ranks), stop_ranks > 0)
    try:
        _, grad_norm, _ = training.optimizer.step()
    except BadNorm as bad_norm:
        where = ranks_with_bad_gradients(training, ranks)
        raise BadStep(step, "grad_norm", str(bad_norm), where, stop_ranks > 0) from None
    training.scheduler.step(increment=1)
    return loss_sum / token_sum, float(grad_norm or 0.0), stop_ranks > 0


# the schedule does not, and a router with an expert bias counts what it sees with gradients
@torch.no_grad()
def evaluate(plan: Plan, ranks: Ranks, training: Training, data: Iterable, step: int) -> float:
    """The LM loss per token, after `step` steps, over trainer.limit_val_batches global batches, always the same."""
    microbatches = [iter(data) for _ in training.chunks]
    batch = plan.config.trainer.global_batch_size
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    with parameters_gathered(plan, training):
        for chunk in training.chunks:
            chunk.eval()
        for _ in range(plan.config.trainer.limit_val_batches):
            loss, tokens = run_microbatches(
                plan, ranks, training, microbatches, batch, forward_only=True
            )
            sums += torch.tensor([loss, tokens], dtype=torch.float64, device=ranks.device)
        for chunk in training.chunks:
            chunk.train()
    torch.distributed.all_reduce(sums)
    loss = (sums[0] / sums[1]).item()
    if not math.isfinite(loss):
        raise Fault(f"step {step}: the loss of the held-out data is {loss} on all ranks")
    return loss


def run_microbatches(
    plan: Plan,
    ranks: Ranks,
    training: Training,
    microbatches: list[Iterator],
    batch: int,
    forward_only: bool,
) -> tuple[float, float]:
    """`batch` sequences, over all ranks, through Megatron-Core's schedule: this rank's (sum of token losses, tokens).

    Both are 0 on ranks that do not hold the last pipeline stage. Ranks of one tensor-parallel group report the same
    sums, context-parallel ranks those of their parts: a quotient of sums over all ranks is the mean over tokens.
    """
    several = len(training.chunks) > 1
    results = get_forward_backward_func()(
        forward_step_func=lambda iterator, model: forward_step(iterator, model, ranks.device),
        data_iterator=microbatches if several else microbatches[0],
        model=training.chunks if several else training.chunks[0],
        num_microbatches=plan.microbatches_of(batch),
        seq_length=plan.config.data.seq_length,
        micro_batch_size=plan.config.trainer.micro_batch_size,
        forward_only=forward_only,
    )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return 0.0, 0.0
    loss, tokens = (
        torch.stack([result["lm_loss"] for result in results]).double().sum(dim=0).tolist()
    )
    return loss, tokens


def forward_step(
    iterator: Iterator, model: torch.nn.Module, device: torch.device
) -> tuple[torch.Tensor, Any]:
    """One microbatch: the model's output and the function that makes a loss of it, as the schedules want them."""
    heartbeat("forward")
    microbatch = next(iterator)
    batch = {name: microbatch[name].to(device, non_blocking=True) for name in KEYS}
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    here = {name: local_part(tensor, rank, size) for name, tensor in batch.items()}
    output = model(here["tokens"], here["position_ids"], attention_mask=None, labels=here["labels"])

    def loss(
        token_losses: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(sum over tokens, tokens, report): the form that stays right under context parallelism.

        Megatron-Core divides the one by the other and takes the mean over context-parallel ranks.
        So that this is the mean over the sequence's tokens wherever the masked ones lie, they are
        counted in all of it; with calculate_per_token_loss it adds up both over the ranks instead.
        """
        mask = here["loss_mask"].reshape(-1).float()
        total = (token_losses.reshape(-1).float() * mask).sum()
        count = mask.sum()
        report = {"lm_loss": torch.stack([total.detach(), count])}
        if model.config.calculate_per_token_loss:
            return total, count.to(torch.int), report
        return total * size, batch["loss_mask"].sum().to(torch.int), report

    return output, loss
