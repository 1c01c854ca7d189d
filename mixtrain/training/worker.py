"""One rank of a run: build everything, train, leave the records behind."""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch

from mixtrain.checkpoint.write_errors import Unwritable, is_write_error, recovery_advice
from mixtrain.config.choices import Accelerator, DataKind, Mode
from mixtrain.config.plan import Plan
from mixtrain.config.schema import to_yaml
from mixtrain.engine.compat import cpu, megatron_fixes
from mixtrain.errors import FAULT, FINISHED, REFUSED, Fault, UserError, print_problems
from mixtrain.system import streams
from mixtrain.system.rank_identity import FOLDER, Identity
from mixtrain.training import preflight
from mixtrain.training.logs import Logs
from mixtrain.training.preflight import rendezvous
from mixtrain.training.run_directory import console_log
from mixtrain.training.signals import StopRequest
from mixtrain.training.watchdog import Watchdog, heartbeat


def run(plan: Plan, identity: Identity) -> int:
    """Train the plan as rank `me`; the exit code. A fault's traceback goes to stderr, of a user's mistake one line."""
    streams.forgive(console_log(plan, identity.rank))
    folder = os.environ.get(FOLDER) if identity.is_ours else None
    with (
        StopRequest() as stop,
        Logs(plan, writes=identity.rank == 0, config_yaml=to_yaml(plan.config)) as logs,
        Watchdog(
            identity.rank,
            plan.config.trainer.timeout_minutes,
            folder,
            logs.failed,
        ),
    ):
        try:
            _run(plan, identity, logs, stop)
            return FINISHED
        except UserError as error:
            logs.failed(" | ".join(error.problems))
            print_problems(error.problems, identity.node)
            return REFUSED
        except Exception as error:
            return _fault(plan, identity, logs, error)


def _fault(plan: Plan, identity: Identity, logs: Logs, error: Exception) -> int:
    """Say what has gone wrong, in one line if it explains itself, in status.json too if that can be written."""
    words = (
        str(error)
        if isinstance(error, Fault)
        else f"rank {identity.rank}: {type(error).__name__}: {error}"
    )
    unwritten = isinstance(error, Unwritable)
    if plain := not unwritten and is_write_error(plan, error):
        words = f"rank {identity.rank}: {error.filename or plan.config.run_dir}: {error.strerror}"
        unwritten = True
    if unwritten:
        words = f"{words}; {recovery_advice(plan, error.errno)}"
    # our launcher says it itself
    if (wrong := logs.failed(words)) and wrong not in words and not identity.is_ours:
        words = f"{words}; {wrong}"
    if plain or isinstance(error, Fault):
        print(f"mixtrain: {words}", file=sys.stderr)
    else:
        print(f"rank {identity.rank}:", file=sys.stderr)
        traceback.print_exc()
    return FAULT


def _run(plan: Plan, identity: Identity, logs: Logs, stop: StopRequest) -> None:
    megatron_fixes.apply()
    if plan.config.trainer.accelerator is Accelerator.cpu:
        cpu.apply()
    # imported here: what Megatron-Core defines on import must find engine/compat/cpu.py applied
    from mixtrain.checkpoint.save import Saver
    from mixtrain.engine import model, optimizer, process_groups
    from mixtrain.training import loop, resume
    from mixtrain.training.preflight.check import Preflight

    rendezvous.check(identity)
    with process_groups.start(plan, identity) as ranks:
        if preflight.wanted(plan):
            Preflight(plan, identity, ranks, logs.say).run()
        if plan.config.trainer.mode is Mode.preflight:
            logs.status("finished", "preflight")
            return
        start = resume.find(plan, ranks, logs.say)
        resume.refuse_a_crash_loop(plan, ranks, start)
        data, entropy, found = build_data(plan, ranks, logs, start.state)
        training = optimizer.build(plan, model.build(plan, ranks.device))
        state = resume.enter(plan, ranks, training, start, found, logs.say)
        logs.begin(state.step)
        saver = Saver(plan, ranks, training, logs.say, lambda: heartbeat("save"))
        state = loop.Loop(plan, ranks, training, data, logs, state).run(stop, saver)
        stopped = state.step < plan.config.trainer.max_steps
        if "test" in data and not stopped:
            loss = loop.evaluate(plan, ranks, training, data["test"], state.step)
            logs.validation(step=state.step, test_loss=loss, last=True)
        saver.drain()
    logs.finish(state.step, stop.signal if stopped else None, stopped, entropy)


def build_data(
    plan: Plan, ranks, logs: Logs, state
) -> tuple[dict[str, object], float | None, dict[str, str]]:
    """This rank's microbatches by part, from where the run is in the training data.

    Also the unigram entropy of the validation tokens in nats (None for mock), and the fingerprint
    of the data.
    """
    from megatron.core import parallel_state

    from mixtrain.checkpoint.same_tokenizer import problem
    from mixtrain.data.batches import Batches
    from mixtrain.data.datasets import build, first_of_all_ranks, unigram_entropy
    from mixtrain.data.fingerprint import fingerprint
    from mixtrain.data.tokenizer import TOKENIZER, copy_tokenizer

    config = plan.config
    train, validation, test = plan.samples_from(state.step, state.consumed_samples)
    prefixes, tokenizer = data_source(plan, ranks, logs)
    # the others would see the copy
    other = problem(config, tokenizer) if tokenizer and ranks.is_first else None
    if problems := first_of_all_ranks([other] if other else []):
        raise UserError(*problems)
    if tokenizer and ranks.is_first and plan.saves:
        # beside the checkpoints, where it is looked for
        copy_tokenizer(tokenizer, Path(config.run_dir) / TOKENIZER)
    parts = build(
        "mock" if plan.is_mock else "indexed",
        data_path=prefixes,
        split=config.data.split,
        seq_length=config.data.seq_length,
        seed=config.seed,
        train_samples=train,
        valid_samples=validation,
        test_samples=test,
        tokenizer_dir=tokenizer,
        vocab_size=config.model.vocab_size,
        path_to_cache=Path(config.data.path_to_cache),
        log=logs.say,
    )
    named = {
        name: part
        for name, part in zip(("train", "validation", "test"), parts, strict=True)
        if part is not None
    }
    batches = partial(
        Batches,
        # with a ramp-up steps differ in size, microbatches do not: the stream of microbatches is
        # the same
        global_batch_size=config.trainer.micro_batch_size * plan.data_parallel_size,
        micro_batch_size=config.trainer.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        vocab_size=config.model.vocab_size,
        num_workers=config.data.num_workers,
    )
    found = (
        unigram_entropy(named["validation"]) if ranks.is_first and "validation" in named else None
    )
    if found:
        logs.say(f"validation: {found[1]:,} tokens with a unigram entropy of {found[0]:.4f} nats")
    starts = {"train": state.consumed_samples}
    streams = {
        name: batches(part, name=name, start=starts.get(name, 0)) for name, part in named.items()
    }
    return streams, found and found[0], fingerprint(named["train"]) if ranks.is_first else {}


def data_source(plan: Plan, ranks, logs: Logs) -> tuple[list[str] | None, Path | None]:
    """(Megatron's data_path, tokenizer directory); the standard library's text is made ready once a node."""
    data = plan.config.data
    if data.kind is not DataKind.stdlib:
        return data.data_path, data.tokenizer and Path(data.tokenizer)
    from mixtrain.data import stdlib

    vocabulary = plan.config.model.vocab_size
    cache = Path(data.path_to_cache)
    if ranks.local_rank == 0:
        stdlib.prepare(cache, vocabulary, log=logs.say)
    torch.distributed.barrier()
    prefix, tokenizer = stdlib.prepare(cache, vocabulary, log=lambda _: None)
    return [str(prefix)], tokenizer
