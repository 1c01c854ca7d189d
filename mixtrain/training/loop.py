"""The training loop: Megatron-Core's schedules, the optimizer step, metrics, validation.

One step, from top to bottom: Loop.run -> Loop.take_step -> train_step -> run_microbatches ->
forward_step.

Rule: every number that leaves this file is the same on every rank, and every decision (stop, fail)
is taken by all ranks in the same step.
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
from mixtrain.system.collectives import ranks_where
from mixtrain.training.bad_steps import (
    BadNorm,
    BadStepFault,
    BadSteps,
    ranks_with_bad_gradients,
)
from mixtrain.training.logs import Logs
from mixtrain.training.sample_digest import SampleIds, digest
from mixtrain.training.signals import StopRequest
from mixtrain.training.watchdog import heartbeat


class Loop:
    """The steps of a run, starting after `state`."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        training: Training,
        data: dict[str, Iterable],
        logs: Logs,
        state: RunState,
    ):
        self.plan = plan
        self.ranks = ranks
        self.training = training
        self.data = data
        self.logs = logs
        self.state = state
        self.batch_size = 0  # sequences in the last step
        self.load = ExpertLoad(plan, training.chunks, ranks.device)
        self.sample_ids = SampleIds()
        self.microbatches = [iter(data["train"]) for _ in training.chunks]
        # every chunk reads the same samples: record those of one
        self.microbatches[0] = self.sample_ids.watch(self.microbatches[0])
        self.bad_steps = BadSteps(
            plan, ranks, logs.say, state.skipped_steps, state.skipped_in_a_row
        )

    def run(self, stop: StopRequest, saver: Saver) -> RunState:
        """Train until trainer.max_steps or a stop request; return the state after the last step."""
        trainer = self.plan.config.trainer
        can_validate = "validation" in self.data
        if self.state.validation_due:
            self.validate(self.state.step)
        for step in range(self.state.step + 1, trainer.max_steps + 1):
            heartbeat("start", step)
            metrics, stopping = self.take_step(step, stop)
            finished = step == trainer.max_steps
            log_due = step == 1 or step % trainer.log_every_n_steps == 0
            if log_due or finished or stopping:
                self.log(metrics, last=not log_due)
            validation_due = can_validate and step % trainer.val_check_interval == 0
            # a stopping run defers validation to its resume: whoever asked to stop is waiting
            if (validation_due or (can_validate and finished)) and not stopping:
                self.validate(step, last=not validation_due)
            self.state = replace(self.state, validation_due=validation_due and stopping)
            saver.after_step(self.state, ending=finished or stopping)
            if stopping:
                break
        return self.state

    def take_step(self, step: int, stop: StopRequest) -> tuple[dict[str, Any], bool]:
        """Take one step or skip a bad one; return (metrics known without communication, stopping).

        lm_loss and grad_norm are None in a skipped step. Raises Fault if the policy is not to skip
        it.
        """
        self.load.clear()
        self.sample_ids.clear()
        self.batch_size = batch_size_at(self.plan.config.trainer, self.state.consumed_samples)
        learning_rate = self.training.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        lm_loss = grad_norm = None
        try:
            lm_loss, grad_norm, stopping = train_step(
                self.plan,
                self.ranks,
                self.training,
                self.microbatches,
                stop,
                step,
                self.batch_size,
            )
            self.bad_steps.reset_streak()
        except BadStepFault as bad:
            samples = self.sample_ids.gather(self.ranks.device)
            self.bad_steps.handle(bad, samples, self.load.not_finite())
            stopping = bad.stopping
        seconds = time.perf_counter() - started
        self.state = replace(
            self.state,
            step=step,
            consumed_samples=self.state.consumed_samples + self.batch_size,
            schedule_steps=self.training.scheduler.num_steps,
            skipped_steps=self.bad_steps.skipped,
            skipped_in_a_row=self.bad_steps.in_a_row,
        )
        metrics = {
            "step": step,
            "lm_loss": lm_loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": self.batch_size * self.plan.config.data.seq_length / seconds,
            "step_seconds": seconds,
        }
        return metrics, stopping

    def log(self, metrics: dict[str, Any], last: bool) -> None:
        """Log a step, with the metrics that ranks compute together. Every rank must call."""
        counts = self.load.collect()
        self.logs.step(
            last=last,
            **metrics,
            load_balancing_loss=collect_balancing_loss(
                self.plan, self.plan.microbatches_of(self.batch_size), self.ranks.device
            ),
            consumed_samples=self.state.consumed_samples,
            skipped_steps=self.state.skipped_steps,
            sample_digest=digest(self.sample_ids.gather(self.ranks.device)),
            tokens_per_expert=counts,
            **token_drop_rate(self.plan, counts, self.batch_size),
            **self.load.balanced_choices_changed(self.plan, self.batch_size),
            **expert_bias(self.plan, self.training.chunks, self.ranks.device),
        )

    def validate(self, step: int, last: bool = False) -> None:
        """Log the validation loss; `last`: measured only because the run ends at `step`."""
        loss = evaluate(self.plan, self.ranks, self.training, self.data["validation"], step)
        self.logs.validation(step=step, val_loss=loss, last=last)


def train_step(
    plan: Plan,
    ranks: Ranks,
    training: Training,
    microbatches: list[Iterator],
    stop: StopRequest,
    step: int,
    batch_size: int,
) -> tuple[float, float, bool]:
    """Take one optimizer step on `batch_size` sequences.

    Returns (LM loss per token, gradient norm before clipping, whether any rank was asked to stop).
    Raises BadStepFault on all ranks, with nothing changed, if the step must not be taken.
    """
    # finalize_model_grads updates the expert biases before the norm is checked
    biases = [bias.clone() for bias in expert_biases(training.chunks)]
    try:
        return _train_step(plan, ranks, training, microbatches, stop, step, batch_size)
    except BadStepFault:
        for bias, before in zip(expert_biases(training.chunks), biases, strict=True):
            bias.copy_(before)
        raise


def _train_step(
    plan: Plan,
    ranks: Ranks,
    training: Training,
    microbatches: list[Iterator],
    stop: StopRequest,
    step: int,
    batch_size: int,
) -> tuple[float, float, bool]:
    """As train_step, but a BadStepFault leaves the expert biases changed."""
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
        chunk.train()
    training.optimizer.zero_grad()
    loss, tokens = run_microbatches(
        plan, ranks, training, microbatches, batch_size, forward_only=False
    )
    is_bad = not math.isfinite(loss)
    sums = torch.tensor(
        [0.0 if is_bad else loss, tokens, float(is_bad), float(stop.signal is not None)],
        dtype=torch.float64,
        device=ranks.device,
    )
    torch.distributed.all_reduce(sums)
    loss_sum, token_sum, bad_ranks, stop_ranks = sums.tolist()
    stopping = stop_ranks > 0
    if bad_ranks:
        raise BadStepFault(step, "lm_loss", "not finite", ranks_where(is_bad), stopping)
    try:
        # computes the gradient norm, checks it (bad_steps.norm_check), clips, updates the
        # parameters
        _, grad_norm, _ = training.optimizer.step()
    except BadNorm as bad_norm:
        bad_gradient_ranks = ranks_with_bad_gradients(training)
        raise BadStepFault(step, "grad_norm", str(bad_norm), bad_gradient_ranks, stopping) from None
    training.scheduler.step(increment=1)
    return loss_sum / token_sum, float(grad_norm or 0.0), stopping


# no_grad here: the schedule does not disable gradients, and a router with an expert bias counts
# tokens whenever they are enabled
@torch.no_grad()
def evaluate(plan: Plan, ranks: Ranks, training: Training, data: Iterable, step: int) -> float:
    """Return the LM loss per token over trainer.limit_val_batches global batches, always the same.

    `step`: the steps taken, for the message. Raises Fault on all ranks if the loss is not finite.
    """
    microbatches = [iter(data) for _ in training.chunks]
    batch_size = plan.config.trainer.global_batch_size
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    with parameters_gathered(plan, training):
        for chunk in training.chunks:
            chunk.eval()
        for _ in range(plan.config.trainer.limit_val_batches):
            loss, tokens = run_microbatches(
                plan, ranks, training, microbatches, batch_size, forward_only=True
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
    batch_size: int,
    forward_only: bool,
) -> tuple[float, float]:
    """Run Megatron-Core's schedule on `batch_size` sequences over all ranks.

    Returns this rank's (sum of token losses, tokens), both 0 outside the last pipeline stage. Ranks
    of one tensor-parallel group return equal sums, context-parallel ranks those of their chunks of
    the sequence. So the quotient of both sums over all ranks is the mean over tokens.
    """
    is_interleaved = len(training.chunks) > 1
    results = get_forward_backward_func()(
        forward_step_func=lambda iterator, model: forward_step(iterator, model, ranks.device),
        data_iterator=microbatches if is_interleaved else microbatches[0],
        model=training.chunks if is_interleaved else training.chunks[0],
        num_microbatches=plan.microbatches_of(batch_size),
        seq_length=plan.config.data.seq_length,
        micro_batch_size=plan.config.trainer.micro_batch_size,
        forward_only=forward_only,
    )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return 0.0, 0.0
    losses = torch.stack([result["lm_loss"] for result in results])
    loss, tokens = losses.double().sum(dim=0).tolist()
    return loss, tokens


def forward_step(
    iterator: Iterator, model: torch.nn.Module, device: torch.device
) -> tuple[torch.Tensor, Any]:
    """Run the model on one microbatch; return (its output, its loss function) for the schedule."""
    heartbeat("forward")
    microbatch = next(iterator)
    batch = {name: microbatch[name].to(device, non_blocking=True) for name in KEYS}
    cp_rank = parallel_state.get_context_parallel_rank()
    cp_size = parallel_state.get_context_parallel_world_size()
    local = {name: local_part(tensor, cp_rank, cp_size) for name, tensor in batch.items()}
    output = model(
        local["tokens"], local["position_ids"], attention_mask=None, labels=local["labels"]
    )

    # Auxiliary losses (load balancing, z-loss) are not part of this loss. The router attaches them
    # to its probabilities or logits (MoEAuxLossAutoScaler in
    # megatron.core.transformer.moe.moe_utils), and backward adds their gradients. The schedule
    # scales them as it scales this loss: grad_scale_func(1) * CP / microbatches; with
    # calculate_per_token_loss grad_scale_func(1), times tokens in the router.
    def loss_function(
        token_losses: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return (sum over tokens, tokens, report), correct under context parallelism.

        Megatron-Core divides the sum by the tokens and averages over context-parallel ranks. To get
        the mean over the sequence's unmasked tokens wherever they are, tokens are counted in the
        full sequence and the sum is multiplied by the context-parallel size. With
        calculate_per_token_loss Megatron-Core adds both over the ranks instead.
        """
        mask = local["loss_mask"].reshape(-1).float()
        loss_sum = (token_losses.reshape(-1).float() * mask).sum()
        token_count = mask.sum()
        report = {"lm_loss": torch.stack([loss_sum.detach(), token_count])}
        if model.config.calculate_per_token_loss:
            return loss_sum, token_count.to(torch.int), report
        return loss_sum * cp_size, batch["loss_mask"].sum().to(torch.int), report

    return output, loss_function
