"""One rank of a generation: build, load, continue the prompts; the first rank prints what came of them.

Rule: standard output has the continuations and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from mixtrain.config.choices import Accelerator
from mixtrain.config.plan import Plan
from mixtrain.engine.compat import cpu, megatron_fixes
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems
from mixtrain.interop.generate.request import Request
from mixtrain.interop.generate.words import say
from mixtrain.system import streams
from mixtrain.system.rank_identity import FOLDER, Identity
from mixtrain.system.status import write_status
from mixtrain.training.signals import StopRequest
from mixtrain.training.watchdog import Watchdog, heartbeat

SECONDS = 2.0  # between two lines of progress


def run(plan: Plan, request: Request, identity: Identity) -> int:
    """Generate as rank `me`; the exit code. A fault's traceback goes to stderr, of a user's mistake one line."""
    folder = os.environ.get(FOLDER) if identity.is_ours else None
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints
    streams.make_tolerant()
    with (
        StopRequest() as stop,
        Watchdog(identity.rank, plan.config.trainer.timeout_minutes, folder, lambda words: None),
    ):
        try:
            return _run(plan, request, identity, stop, results)
        except UserError as error:
            print_problems(error.problems)
            return REFUSED
        except Exception:
            print(f"rank {identity.rank}:", file=sys.stderr)
            traceback.print_exc()
            return FAULT


def _run(
    plan: Plan, request: Request, identity: Identity, stop: StopRequest, results: TextIO
) -> int:
    megatron_fixes.apply()
    if plan.config.trainer.accelerator is Accelerator.cpu:
        cpu.apply()
    # imported here: what Megatron-Core defines on import must find engine/compat/cpu.py applied
    from mixtrain.checkpoint import load
    from mixtrain.engine import model, process_groups
    from mixtrain.interop.generate.loop import Generator, Limits, Sequence, Watch
    from mixtrain.interop.generate.text import Text

    text = Text(request.tokenizer, request.stop)
    prompts = [text.encode(prompt, request.chat) for prompt in request.prompts]
    refuse_lengths(prompts, request.max_new_tokens, plan.config.model.max_position_embeddings)
    with process_groups.start(plan, identity) as ranks:
        heartbeat("load")
        # sizes that a file says
        load.refuse_another_model(plan, Path(plan.config.checkpoint.load_weights))
        chunks = model.build(plan, ranks.device, drawn=False)
        load.load_model(plan, ranks, chunks, Path(plan.config.checkpoint.load_weights))
        progress = Progress(len(prompts), say if ranks.is_first else lambda words: None)
        watch = Watch(lambda: stop.signal is not None, progress.passed)
        limits = Limits(request.max_new_tokens, text.ends(), text.stops)
        generator = Generator(chunks[0], ranks.device, request.sampling, limits, watch)
        stopping = False
        unread = False
        size = request.batch_size * plan.data_parallel_size
        for first in range(0, len(prompts), size):
            batch = [
                Sequence(first + place, ids)
                for place, ids in enumerate(prompts[first : first + size])
            ]
            stopping = generator.continue_all(batch)
            if ranks.is_first and not unread:
                unread = not write(results, request, text, batch)
                stop.signals += [signal.SIGPIPE] * unread
            if stopping:
                break
    progress.end(sum(map(len, prompts)))
    if (stopping or unread) and identity.is_ours and identity.rank == 0:
        write_status(
            plan.config.run_dir, state="stopped", step=0, max_steps=1, reason="stopped on request"
        )
    return FINISHED


def refuse_lengths(prompts: list[list[int]], new: int, positions: int) -> None:
    """UserError for every prompt that has no token, or leaves no room for as many new ones as were asked for."""
    problems = []
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            problems.append(f"prompt {number} has no token; there is nothing to continue")
        if len(prompt) + new > positions:
            left = positions - len(prompt)
            problems.append(
                f"prompt {number} has {count(len(prompt), 'token')}, with --max-new-tokens {new}"
                f" more than model.max_position_embeddings = {positions:,}; "
                + (f"use --max-new-tokens {left}" if left > 0 else "use a shorter one")
            )
    if problems:
        raise UserError(*problems)


def write(results: TextIO, request: Request, text, batch: list) -> bool:
    """Print the continuations of a batch, in the order of the prompts; whether somebody reads them."""
    try:
        _print(results, request, text, batch)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())
        return False
    return True


def _print(results: TextIO, request: Request, text, batch: list) -> None:
    for sequence in batch:
        words = text.continuation(sequence.prompt, sequence.tokens)
        if request.as_json:
            line = {
                "prompt": request.prompts[sequence.number],
                "text": words,
                "tokens": sequence.tokens,
            }
            words = json.dumps({**line, "reason": sequence.reason}, ensure_ascii=False)
        print(words, file=results)
    results.flush()


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


class Progress:
    """How far a generation is, for who waits for it."""

    def __init__(self, prompts: int, say: Callable[[str], None]):
        self.prompts = prompts
        self.say = say
        self.tokens = self.passes = 0
        self.first = 0.0  # s until the first tokens
        self.started = self.said = time.perf_counter()

    def passed(self, tokens: int, unfinished: int) -> None:
        """A pass has given so many tokens; of the prompts in it so many go on."""
        now = time.perf_counter()
        self.tokens = self.tokens + tokens
        self.passes = self.passes + 1
        self.first = self.first or now - self.started
        heartbeat("token", self.passes)
        if now - self.said > SECONDS:
            self.said = now
            self.say(
                f"{count(self.tokens, 'token')}, {self.rate(now):,.1f} tokens/s; {unfinished}"
                " unfinished"
            )

    def rate(self, now: float) -> float:
        return self.tokens / (now - self.started)

    def end(self, prompt_tokens: int) -> None:
        now = time.perf_counter()
        self.say(
            f"{count(self.prompts, 'prompt')} with {count(prompt_tokens, 'token')} continued with"
            f" {self.tokens:,} in {now - self.started:.2f} s: {self.rate(now):,.1f} tokens/s, the"
            f" first after {self.first:.2f} s"
        )
