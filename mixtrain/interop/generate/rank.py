"""Run one rank of a generation: build, load, generate; the first rank prints the continuations.

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

from mixtrain.config.plan import Plan
from mixtrain.engine.compat.prepare import prepare
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems
from mixtrain.interop.generate.log_relay import print_progress
from mixtrain.interop.generate.request import Request
from mixtrain.system import streams
from mixtrain.system.rank_identity import FOLDER, Identity
from mixtrain.system.status import write_status
from mixtrain.training.signals import StopRequest
from mixtrain.training.watchdog import Watchdog, heartbeat

INTERVAL = 2.0  # seconds between two lines of progress


def run(plan: Plan, request: Request, identity: Identity) -> int:
    """Generate as one rank; return the exit code.

    User errors print one line, other errors a traceback, both to stderr.
    """
    folder = os.environ.get(FOLDER) if identity.is_ours else None
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of libraries go to stderr
    streams.make_tolerant()
    with (
        StopRequest() as stop,
        Watchdog(identity.rank, plan.config.trainer.timeout_minutes, folder, lambda message: None),
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
    prepare(plan.config.trainer.accelerator)
    # after prepare, which patches Megatron-Core's classes before they are defined
    from mixtrain.checkpoint import load
    from mixtrain.engine import model, process_groups
    from mixtrain.interop.generate.generator import Callbacks, Generator, Sequence, StopConditions
    from mixtrain.interop.generate.tokenization import PromptTokenizer

    tokenizer = PromptTokenizer(request.tokenizer, request.stop)
    prompts = [tokenizer.encode(prompt, request.chat) for prompt in request.prompts]
    refuse_lengths(prompts, request.max_new_tokens, plan.config.model.max_position_embeddings)
    with process_groups.start(plan, identity) as ranks:
        heartbeat("load")
        checkpoint = Path(plan.config.checkpoint.load_weights)
        # before model.build allocates sizes that run_state.json names
        load.refuse_another_model(plan, checkpoint)
        chunks = model.build(plan, ranks.device, drawn=False)
        load.load_model(plan, ranks, chunks, checkpoint)
        progress = Progress(
            len(prompts), print_progress if ranks.is_first else lambda message: None
        )
        callbacks = Callbacks(lambda: stop.signal is not None, progress.on_pass)
        stop_conditions = StopConditions(
            request.max_new_tokens, tokenizer.end_tokens(), tokenizer.has_stop_text
        )
        generator = Generator(chunks[0], ranks.device, request.sampling, stop_conditions, callbacks)
        stopped = False
        pipe_closed = False
        size = request.batch_size * plan.data_parallel_size
        for first in range(0, len(prompts), size):
            numbered = enumerate(prompts[first : first + size], start=first)
            batch = [Sequence(number, prompt) for number, prompt in numbered]
            stopped = generator.generate(batch)
            if ranks.is_first and not pipe_closed:
                pipe_closed = not write_continuations(results, request, tokenizer, batch)
                stop.signals += [signal.SIGPIPE] * pipe_closed
            if stopped:
                break
    progress.end(sum(map(len, prompts)))
    if (stopped or pipe_closed) and identity.is_ours and identity.rank == 0:
        write_status(
            plan.config.run_dir, state="stopped", step=0, max_steps=1, reason="stopped on request"
        )
    return FINISHED


def refuse_lengths(prompts: list[list[int]], max_new_tokens: int, positions: int) -> None:
    """UserError for every prompt that has no token or leaves no room for the new tokens."""
    problems = []
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            problems.append(f"prompt {number} has no token; there is nothing to continue")
        room = positions - len(prompt)
        if max_new_tokens > room:
            advice = f"use --max-new-tokens {room}" if room > 0 else "use a shorter one"
            problems.append(
                f"prompt {number} has {count(len(prompt), 'token')}, with --max-new-tokens"
                f" {max_new_tokens} more than model.max_position_embeddings = {positions:,};"
                f" {advice}"
            )
    if problems:
        raise UserError(*problems)


def write_continuations(results: TextIO, request: Request, tokenizer, batch: list) -> bool:
    """Print a batch in the order of the prompts; return False if the reader closed the pipe."""
    try:
        for sequence in batch:
            print(_result(request, tokenizer, sequence), file=results)
        results.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())
        return False
    return True


def _result(request: Request, tokenizer, sequence) -> str:
    """Return the text of a continuation, or its line of JSON."""
    text = tokenizer.continuation(sequence.prompt, sequence.tokens)
    if not request.as_json:
        return text
    values = {
        "prompt": request.prompts[sequence.number],
        "text": text,
        "tokens": sequence.tokens,
        "reason": sequence.reason,
    }
    return json.dumps(values, ensure_ascii=False)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


class Progress:
    """Report the speed of a generation."""

    def __init__(self, prompts: int, report: Callable[[str], None]):
        self.prompts = prompts
        self.report = report
        self.tokens = self.passes = 0
        self.first_pass = 0.0  # seconds
        self.started = self.reported = time.perf_counter()

    def on_pass(self, tokens: int, unfinished: int) -> None:
        """Count the tokens of a pass, and report if the last report is older than INTERVAL."""
        now = time.perf_counter()
        self.tokens += tokens
        self.passes += 1
        self.first_pass = self.first_pass or now - self.started
        heartbeat("token", self.passes)
        if now - self.reported > INTERVAL:
            self.reported = now
            self.report(
                f"{count(self.tokens, 'token')}, {self.rate(now):,.1f} tokens/s; {unfinished}"
                " unfinished"
            )

    def rate(self, now: float) -> float:
        """Return tokens per second."""
        return self.tokens / (now - self.started)

    def end(self, prompt_tokens: int) -> None:
        now = time.perf_counter()
        self.report(
            f"{count(self.prompts, 'prompt')} with {count(prompt_tokens, 'token')} continued with"
            f" {self.tokens:,} in {now - self.started:.2f} s: {self.rate(now):,.1f} tokens/s, the"
            f" first after {self.first_pass:.2f} s"
        )
