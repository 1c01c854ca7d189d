"""Steps that are not taken: a loss or gradient that is not finite, or a gradient larger than it may be.

Rule: all ranks see a bad step together, before anything has changed, and do the same about it.
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

RECORDS = "bad_steps.jsonl"


class BadStep(Fault):
    """A step that no rank takes. `ranks` are those where it was seen, `stopping` whether one was asked to stop."""

    def __init__(self, step: int, what: str, value: str, ranks: list[int], stopping: bool):
        super().__init__(f"step {step}: {what} is {value} on {_named('rank', ranks)}")
        self.step = step
        self.what = what
        self.value = value
        self.ranks = ranks
        self.stopping = stopping


class BadNorm(Exception):
    """The gradient's norm on some rank, the highest, is no norm to step with. Raised on all ranks."""

    def __init__(self, norm: float):
        super().__init__(norm)
        self.norm = norm

    def __str__(self) -> str:
        return f"{self.norm:.4g}" if math.isfinite(self.norm) else "not finite"


def guard_norm(plan: Plan, training: Training, device: torch.device) -> None:
    """Have the optimizer look at the norm that it computes for clipping before it clips: BadNorm if it is bad.

    Nothing has changed by then, and the norm is not computed twice. Copies of the model should have the same norm;
    where they do not, as after a fault of the memory, they still take one decision.
    """
    compute = training.optimizer.get_grad_norm
    bound = plan.config.trainer.bad_step_grad_norm or math.inf

    def guarded() -> float:
        norm = float(compute())
        highest = torch.tensor(
            [norm if math.isfinite(norm) else math.inf], dtype=torch.float64, device=device
        )
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        if not math.isfinite(highest.item()) or highest.item() > bound:
            raise BadNorm(highest.item())
        return norm

    training.optimizer.get_grad_norm = guarded


def ranks_with_bad_gradients(training: Training, ranks: Ranks) -> list[int]:
    """The ranks whose gradient buffers hold what is not finite. Every rank must call."""
    bad = any(
        not bool(torch.isfinite(buffer.grad_data).all())
        for chunk in training.chunks
        if isinstance(chunk, DistributedDataParallel)  # Megatron-FSDP has no such buffers
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    )
    return ranks_where(bad, ranks)


def ranks_where(mine: bool, ranks: Ranks) -> list[int]:
    """The ranks on which `mine` is true. Every rank must call."""
    flags = torch.zeros(ranks.world_size, device=ranks.device)
    flags[ranks.rank] = float(mine)
    torch.distributed.all_reduce(flags)
    return flags.nonzero().flatten().tolist()


class BadSteps:
    """What trainer.bad_step_policy does about them, and how many there were."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        say: Callable[[str], None],
        skipped: int = 0,
        in_a_row: int = 0,
    ):
        self.plan = plan
        self.ranks = ranks
        self.say = say
        self.skipped = skipped
        self.in_a_row = in_a_row

    def meet(self, bad: BadStep, samples: list[list[int]], routers: list[list[int]]) -> None:
        """Record a bad step, its samples, and the [layer, rank] of routers that were not finite; go on, or raise."""
        where = ""
        if routers:
            layer, rank = routers[0]
            where = (
                f"; the router of layer {layer} on rank {rank} was the first that was not finite"
            )
        if self.ranks.is_first:
            record = {"step": bad.step, "what": bad.what, "value": bad.value, "ranks": bad.ranks}
            try:
                with open(Path(self.plan.config.run_dir) / RECORDS, "a") as file:
                    file.write(
                        json.dumps({**record, "samples": samples, "routers": routers}) + "\n"
                    )
            # a full disk, say: what is wrong with the step is said all the same
            except OSError as error:
                self.say(f"warning: {RECORDS} could not be written ({error.strerror})")
        detail = f"{bad}{where}; its {len(samples)} samples are in {RECORDS}"
        if self.plan.config.trainer.bad_step_policy is Policy.stop:
            raise Fault(f"{detail}; no weights were changed by it")
        self.skipped = self.skipped + 1
        self.in_a_row = self.in_a_row + 1
        limit = self.plan.config.trainer.bad_step_limit
        if self.in_a_row > limit:
            raise Fault(f"{detail}; more than trainer.bad_step_limit = {limit} in a row")
        self.say(f"warning: {detail}; skipped, {self.skipped} so far")

    def good(self) -> None:
        """A step was taken."""
        self.in_a_row = 0


def _named(what: str, numbers: list[int]) -> str:
    """`rank 1`, `ranks 0, 1, 2, 3 and 12 more`, or `all ranks` where none stands out."""
    if not numbers:
        return f"all {what}s"
    shown = ", ".join(map(str, numbers[:4])) + (
        f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    )
    return f"{what}{'s' * (len(numbers) > 1)} {shown}"
