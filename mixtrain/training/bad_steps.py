"""Bad steps, which are not taken: loss or gradient not finite, or gradient norm above its bound.

Rule: all ranks detect a bad step together, before any weight changes, and handle it in the same
way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel

from mixtrain.config.choices import BadStep as Policy
from mixtrain.config.plan import Plan
from mixtrain.engine.optimizer import Training
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import Fault
from mixtrain.system.collectives import ranks_where

RECORDS = "bad_steps.jsonl"


class BadStepFault(Fault):
    """A step that no rank takes.

    `ranks`: where the bad value was seen. `stopping`: whether any rank was asked to stop.
    """

    def __init__(self, step: int, what: str, value: str, ranks: list[int], stopping: bool):
        super().__init__(f"step {step}: {what} is {value} on {_ranks_text(ranks)}")
        self.step = step
        self.what = what
        self.value = value
        self.ranks = ranks
        self.stopping = stopping


class BadNorm(Exception):
    """The highest norm of all ranks is not finite or above its bound. Raised on all ranks."""

    def __init__(self, norm: float):
        super().__init__(norm)
        self.norm = norm

    def __str__(self) -> str:
        return f"{self.norm:.4g}" if math.isfinite(self.norm) else "not finite"


def norm_check(plan: Plan, device: torch.device) -> Callable[[float], None]:
    """Return the check that the optimizer runs on its gradient norm before it clips.

    The check raises BadNorm on all ranks if any rank's norm is not finite or above
    trainer.bad_step_grad_norm. All ranks compare the highest norm: copies of the model should have
    equal norms, but after a memory fault they may differ, and the ranks must still decide the same.
    """
    bound = plan.config.trainer.bad_step_grad_norm or math.inf

    def check(norm: float) -> None:
        highest = torch.tensor(
            [norm if math.isfinite(norm) else math.inf], dtype=torch.float64, device=device
        )
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        if not math.isfinite(highest.item()) or highest.item() > bound:
            raise BadNorm(highest.item())

    return check


def ranks_with_bad_gradients(training: Training) -> list[int]:
    """Return the ranks whose gradient buffers are not finite. Every rank must call."""
    bad = any(
        not bool(torch.isfinite(buffer.grad_data).all())
        for chunk in training.chunks
        if isinstance(chunk, DistributedDataParallel)  # Megatron-FSDP has no such buffers
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    )
    return ranks_where(bad)


class BadSteps:
    """Applies trainer.bad_step_policy and counts the skipped steps."""

    def __init__(
        self, plan: Plan, ranks: Ranks, say: Callable[[str], None], skipped: int, in_a_row: int
    ):
        self.plan = plan
        self.ranks = ranks
        self.say = say
        self.skipped = skipped
        self.in_a_row = in_a_row

    def handle(self, bad: BadStepFault, samples: list[list[int]], routers: list[list[int]]) -> None:
        """Record a bad step; count it as skipped, or raise Fault by policy or above the limit.

        `samples`: ids of the step's samples. `routers`: [layer, rank] of routers whose output was
        not finite.
        """
        self._record(bad, samples, routers)
        where = ""
        if routers:
            layer, rank = routers[0]
            where = (
                f"; the router of layer {layer} on rank {rank} was the first that was not finite"
            )
        detail = f"{bad}{where}; its {len(samples)} samples are in {RECORDS}"
        if self.plan.config.trainer.bad_step_policy is Policy.stop:
            raise Fault(f"{detail}; no weights were changed by it")
        self.skipped += 1
        self.in_a_row += 1
        limit = self.plan.config.trainer.bad_step_limit
        if self.in_a_row > limit:
            raise Fault(f"{detail}; more than trainer.bad_step_limit = {limit} in a row")
        self.say(f"warning: {detail}; skipped, {self.skipped} so far")

    def _record(
        self, bad: BadStepFault, samples: list[list[int]], routers: list[list[int]]
    ) -> None:
        if not self.ranks.is_first:
            return
        record = {"step": bad.step, "what": bad.what, "value": bad.value, "ranks": bad.ranks}
        line = json.dumps({**record, "samples": samples, "routers": routers})
        try:
            with open(Path(self.plan.config.run_dir) / RECORDS, "a") as file:
                file.write(line + "\n")
        # a full disk, for example: still report the bad step itself
        except OSError as error:
            self.say(f"warning: {RECORDS} could not be written ({error.strerror})")

    def reset_streak(self) -> None:
        """Call after a step that was taken."""
        self.in_a_row = 0


def _ranks_text(ranks: list[int]) -> str:
    """Return `rank 1`, `ranks 0, 1, 2, 3 and 12 more`, or `all ranks` for an empty list."""
    if not ranks:
        return "all ranks"
    shown = ", ".join(map(str, ranks[:4]))
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"
