"""One rank of a run: build everything, train, write the records."""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch

from mixtrain.checkpoint.write_errors import Unwritable, is_write_error, recovery_advice
from mixtrain.config.choices import DataKind, Mode
from mixtrain.config.plan import Plan
from mixtrain.config.typed_config import to_yaml
from mixtrain.engine.compat.prepare import prepare
from mixtrain.errors import FAULT, FINISHED, REFUSED, Fault, UserError, print_problems
from mixtrain.system import collectives, streams
from mixtrain.system.rank_identity import FOLDER, Identity
from mixtrain.training import preflight
from mixtrain.training.logs import Logs
from mixtrain.training.preflight import rendezvous
from mixtrain.training.run_directory import console_log
from mixtrain.training.signals import StopRequest
from mixtrain.training.watchdog import Watchdog, heartbeat


def run(plan: Plan, identity: Identity) -> int:
    """Train the plan on this rank and return the exit code.

    Internal errors print a traceback; user errors and Faults print one line.
    """
    streams.make_tolerant(console_log(plan, identity.rank))
    folder = os.environ.get(FOLDER) if identity.is_ours else None
    with (
        StopRequest() as stop,
        Logs(plan, writes=identity.rank == 0, config_yaml=to_yaml(plan.config)) as logs,
        Watchdog(
            identity.rank,
            plan.config.trainer.timeout_minutes,
            folder,
            logs.record_failure,
        ),
    ):
        try:
            _run(plan, identity, logs, stop)
            return FINISHED
        except UserError as error:
            logs.record_failure(" | ".join(error.problems))
            print_problems(error.problems, identity.node)
            return REFUSED
        except Exception as error:
            return _fault(plan, identity, logs, error)


def _fault(plan: Plan, identity: Identity, logs: Logs, error: Exception) -> int:
    """Report an error on stderr and in status.json; return its exit code.

    Faults and file system errors print one line, other errors a traceback.
    """
    is_file_error = not isinstance(error, Unwritable) and is_write_error(plan, error)
    if isinstance(error, Fault):
        message = str(error)
    elif is_file_error:
        path = error.filename or plan.config.run_dir
        message = f"rank {identity.rank}: {path}: {error.strerror}"
    else:
        message = f"rank {identity.rank}: {type(error).__name__}: {error}"
    if isinstance(error, Unwritable) or is_file_error:
        message = f"{message}; {recovery_advice(plan, error.errno)}"
    status_problem = logs.record_failure(message)
    # this project's launcher reports it itself
    if status_problem and status_problem not in message and not identity.is_ours:
        message = f"{message}; {status_problem}"
    if is_file_error or isinstance(error, Fault):
        print(f"mixtrain: {message}", file=sys.stderr)
    else:
        print(f"rank {identity.rank}:", file=sys.stderr)
        traceback.print_exc()
    return FAULT


def _run(plan: Plan, identity: Identity, logs: Logs, stop: StopRequest) -> None:
    prepare(plan.config.trainer.accelerator)
    # imported here: prepare must be called before Megatron-Core's modules are imported
    from mixtrain.checkpoint.save import Saver
    from mixtrain.engine import model, optimizer, process_groups
    from mixtrain.training import bad_steps, loop, resume
    from mixtrain.training.preflight.check import PreflightRun

    rendezvous.check(identity)
    with process_groups.start(plan, identity) as ranks:
        if preflight.is_enabled(plan):
            PreflightRun(plan, identity, ranks, logs.say).run()
        if plan.config.trainer.mode is Mode.preflight:
            logs.status("finished", "preflight")
            return
        start = resume.find(plan, ranks, logs.say)
        resume.refuse_a_crash_loop(plan, ranks, start)
        data, entropy, fingerprint = build_data(plan, ranks, logs, start.state)
        check_norm = bad_steps.norm_check(plan, ranks.device)
        training = optimizer.build(plan, model.build(plan, ranks.device), check_norm)
        state = resume.enter(plan, ranks, training, start, fingerprint, logs.say)
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
    """Return (microbatches, entropy of the validation tokens, fingerprint of the data).

    This rank's microbatches by split, those of "train" from where the run is; the unigram entropy
    of the validation tokens in nats (first rank, None for mock data); the fingerprint of the
    training data (first rank, else {}). Every rank must call.
    """
    from megatron.core import parallel_state

    from mixtrain.data.batches import Batches
    from mixtrain.data.datasets import unigram_entropy
    from mixtrain.data.fingerprint import fingerprint

    config = plan.config
    datasets = build_datasets(plan, ranks, logs, state)
    batches = partial(
        Batches,
        # a batch size ramp-up changes the microbatches of a step, not their order
        global_batch_size=config.trainer.micro_batch_size * plan.data_parallel_size,
        micro_batch_size=config.trainer.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        vocab_size=config.model.vocab_size,
        num_workers=config.data.num_workers,
    )
    entropy = None
    if ranks.is_first and "validation" in datasets:
        if entropy_and_tokens := unigram_entropy(datasets["validation"]):
            entropy, tokens = entropy_and_tokens
            logs.say(f"validation: {tokens:,} tokens with a unigram entropy of {entropy:.4f} nats")
    starts = {"train": state.consumed_samples}
    microbatches = {
        name: batches(dataset, name=name, start=starts.get(name, 0))
        for name, dataset in datasets.items()
    }
    return microbatches, entropy, fingerprint(datasets["train"]) if ranks.is_first else {}


def build_datasets(plan: Plan, ranks, logs: Logs, state) -> dict[str, object]:
    """Return the data sets by split, without empty ones. Every rank must call.

    The tokenizer is checked, and copied beside the checkpoints, where tools look for it.
    """
    from mixtrain.checkpoint.same_tokenizer import problem
    from mixtrain.data.datasets import build
    from mixtrain.data.tokenizer import TOKENIZER, copy_tokenizer

    config = plan.config
    train, validation, test = plan.samples_from(state.step, state.consumed_samples)
    prefixes, tokenizer = data_source(plan, ranks, logs)
    # on the first rank alone: the other ranks could already see the copy that is made below
    mismatch = problem(config, tokenizer) if tokenizer and ranks.is_first else None
    if mismatch := collectives.first_problem(mismatch):
        raise UserError(mismatch)
    if tokenizer and ranks.is_first and plan.saves:
        copy_tokenizer(tokenizer, Path(config.run_dir) / TOKENIZER)
    splits = build(
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
    return {
        name: dataset
        for name, dataset in zip(("train", "validation", "test"), splits, strict=True)
        if dataset is not None
    }


def data_source(plan: Plan, ranks, logs: Logs) -> tuple[list[str] | None, Path | None]:
    """Return (Megatron's data_path, tokenizer directory). Every rank must call.

    data.kind = stdlib: the first rank of each node prepares the standard library's text.
    """
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
