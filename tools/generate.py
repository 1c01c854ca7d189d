"""Continue prompts from a checkpoint, at any layout.

    python tools/generate.py runs/laptop --prompt "def main("
    python tools/generate.py runs/laptop/iter_0000300 --prompt def --temperature 0.8 --seed 7
    python tools/generate.py CHECKPOINT --prompt-file prompts.txt --json parallel=ep2
    torchrun --nproc-per-node 4 tools/generate.py CHECKPOINT --prompt Hello parallel=pp2_ep2

CHECKPOINT is iter_NNNNNNN, or a run directory, whose newest valid checkpoint is used. The model has
the settings of its run. Overrides as for train.py (KEY=VALUE, GROUP=OPTION) choose the layout; the
default is one rank. The tool starts the ranks itself. The same seed gives the same text at every
layout.

Standard output has the continuation of each prompt, or with --json a line for each: prompt, text,
tokens, reason (eod: the end of the document, stop: a text of --stop, length: --max-new-tokens,
interrupted). Standard error has the rest. Exit codes: 0 done, 2 the arguments or the input are
wrong, 1 any other failure, 130 interrupted.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

# mixtrain need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.checkpoint.state import state_of  # noqa: E402
from mixtrain.cli import INTERRUPTED  # noqa: E402
from mixtrain.config.plan import Plan  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems  # noqa: E402
from mixtrain.interop.generate import generation_plan, tokenizer_lookup  # noqa: E402
from mixtrain.interop.generate.log_relay import LogRelay, print_progress  # noqa: E402
from mixtrain.interop.generate.request import Request, Sampling, read_prompts  # noqa: E402
from mixtrain.launch import local  # noqa: E402
from mixtrain.system import scratch  # noqa: E402
from mixtrain.system.closed_pipe import reader_has_gone, run_main  # noqa: E402
from mixtrain.system.rank_identity import LAUNCHER, Identity, die_with, read_identity  # noqa: E402
from mixtrain.training.run_directory import previous_status  # noqa: E402


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return (options, overrides)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="iter_NNNNNNN, or a run directory")
    add("--prompt", metavar="TEXT", action="append", default=[], help="may be repeated")
    add(
        "--prompt-file",
        metavar="FILE",
        help='one prompt per line, or .jsonl with one {"prompt": TEXT} per line',
    )
    add("--max-new-tokens", metavar="N", type=int, default=128, help="(default: 128)")
    add(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0 takes the likeliest token (default: 0)",
    )
    add("--top-k", metavar="K", type=int, help="choose among the K likeliest tokens")
    add(
        "--top-p",
        metavar="P",
        type=float,
        help="choose among the likeliest tokens that together have this probability",
    )
    add("--seed", metavar="N", type=int, default=0, help="of sampling (default: 0)")
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end before this text; may be repeated",
    )
    add("--chat", action="store_true", help="format each prompt with the chat template")
    add("--tokenizer", metavar="DIR", help="a Hugging Face directory (default: the run's)")
    add(
        "--allow-other-tokenizer",
        action="store_true",
        help="use --tokenizer DIR even if the model was trained with another one",
    )
    add("--batch-size", metavar="N", type=int, default=16, help="prompts at a time (default: 16)")
    add("--json", action="store_true", help="print a line of JSON for each prompt")
    options, overrides = parser.parse_known_args(argv)
    if unknown := [word for word in overrides if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, overrides


def request_of(options: argparse.Namespace) -> Request:
    """Return the request, without a tokenizer. UserError with every problem."""
    prompts = options.prompt + (read_prompts(options.prompt_file) if options.prompt_file else [])
    request = Request(
        prompts=prompts,
        tokenizer="",
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        max_new_tokens=options.max_new_tokens,
        stop=options.stop,
        chat=options.chat,
        batch_size=options.batch_size,
        as_json=options.json,
    )
    if problems := list(request.problems()):
        raise UserError(*problems)
    return request


def generate(options: argparse.Namespace, overrides: list[str], identity: Identity | None) -> int:
    """Start the ranks (`identity` is None), or run as a rank that torchrun or srun started."""
    request = request_of(options)
    tree, problems = generation_plan.compose_overrides(overrides)
    full = str(tree.checkpoint.verify) == "full"
    checkpoint, damaged = generation_plan.find_checkpoint(options.checkpoint, full)
    run_state = state_of(checkpoint)
    code = FINISHED
    (folder, _) = scratch.make("generate-")
    try:
        plan = generation_plan.plan_of(
            tree, overrides, run_state, checkpoint, folder, identity, problems
        )
        tokenizer = tokenizer_lookup.find_directory(
            options.tokenizer or tree.data.tokenizer,  # set only by an override
            checkpoint,
            run_state,
            plan.config.model.vocab_size,
            options.allow_other_tokenizer,
        )
        rows = tokenizer_lookup.unpadded_rows(tokenizer, run_state)
        request = request.for_model(tokenizer, rows)
        if identity is None or identity.rank == 0:
            for line in generation_plan.summary(plan, run_state, checkpoint, damaged):
                print_progress(line)
        if identity is None:
            code = start_ranks(plan, request, folder)
        else:
            code = run_rank(plan, request, identity)
        return code
    finally:
        if code == FAULT and identity is None:
            scratch.keep(folder)  # the error message names a log in it
        else:
            shutil.rmtree(folder, ignore_errors=True)


def start_ranks(plan: Plan, request: Request, folder: str) -> int:
    """Start this machine's ranks and wait for them."""
    request.write(folder)
    with LogRelay(Path(folder, "logs", "rank_0.log")):
        code = local.start(plan, (sys.executable, str(Path(__file__).resolve())))
    if code != FINISHED or previous_status(folder).get("state") != "stopped":
        return code
    if reader_has_gone():
        raise BrokenPipeError
    return INTERRUPTED


def run_rank(plan: Plan, request: Request, identity: Identity) -> int:
    from mixtrain.interop.generate.rank import run  # the first import of torch

    return run(plan, request, identity)


def main() -> int:
    identity = None
    try:
        identity = read_identity()
        if identity and identity.is_ours:
            die_with(int(os.environ[LAUNCHER]))
            plan = local.load_plan()
            return run_rank(plan, Request.read(plan.config.run_dir), identity)
        return generate(*parse_arguments(), identity)
    except UserError as error:
        if identity is None or identity.local_rank == 0:
            print_problems(error.problems)
        return REFUSED
    except KeyboardInterrupt:  # only before the ranks start: they handle the signal themselves
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run_main(main))
