"""Continue prompts from a checkpoint, at any layout.

    python tools/generate.py runs/laptop --prompt "def main("
    python tools/generate.py runs/laptop/iter_0000300 --prompt "def" --prompt "class" --temperature
      0.8 --seed 7
    python tools/generate.py CHECKPOINT --prompt-file prompts.txt --json parallel=ep2
    torchrun --nproc-per-node 4 tools/generate.py CHECKPOINT --prompt Hello
      parallel.pipeline_model_parallel_size=4

CHECKPOINT is iter_NNNNNNN, or a run directory, of which the newest valid checkpoint is taken. The
model is as its run had it; words as for train.py (KEY=VALUE, GROUP=OPTION) say the layout, one rank
without them, and this tool starts the ranks. The same seed gives the same text at every layout.

Standard output has the continuation of each prompt, or with --json a line for each: prompt, text,
tokens, reason (eod: the end of the document, stop: a text of --stop, length: --max-new-tokens,
interrupted). Standard error has the rest. Exit codes: 0 done, 2 the arguments or the input are
wrong, 1 a fault, 130 interrupted.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import INTERRUPTED  # noqa: E402
from mixtrain.config.plan import Plan  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems  # noqa: E402
from mixtrain.interop.generate import settings, tokenizer  # noqa: E402
from mixtrain.interop.generate.request import Request, Sampling, read_prompts  # noqa: E402
from mixtrain.interop.generate.words import Follower, say  # noqa: E402
from mixtrain.launch import local  # noqa: E402
from mixtrain.system import scratch  # noqa: E402
from mixtrain.system.closed_pipe import ended, reader_has_gone  # noqa: E402
from mixtrain.system.rank_identity import LAUNCHER, Identity, die_with, read_identity  # noqa: E402
from mixtrain.training.run_directory import former  # noqa: E402


def parse_arguments(arguments=None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="iter_NNNNNNN, or a run directory")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="may be given several times"
    )
    parser.add_argument(
        "--prompt-file", metavar="FILE", help='a prompt a line, or .jsonl: {"prompt": TEXT} a line'
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=128, help="(default: 128)"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0, the default: the likeliest"
    )
    parser.add_argument(
        "--top-k", metavar="K", type=int, help="choose among the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, help="among the likeliest of together this probability"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the choice (default: 0)"
    )
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; several"
    )
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is said by a user in the chat template"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="a Hugging Face directory (default: the run's)"
    )
    parser.add_argument(
        "--allow-other-tokenizer", action="store_true", help="take DIR though the model has another"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=16, help="prompts at a time (default: 16)"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    options, words = parser.parse_known_args(arguments)
    if unknown := [word for word in words if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, words


def asked(options: argparse.Namespace) -> Request:
    """What is asked for, but for the tokenizer; UserError with all that is wrong with it."""
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


def generate(options: argparse.Namespace, words: list[str], identity: Identity | None) -> int:
    """As the process that starts the ranks, or as a rank that somebody else has started."""
    request = asked(options)
    tree, problems = settings.composed(words)
    checkpoint, damaged = settings.find(
        options.checkpoint, full=str(tree.checkpoint.verify) == "full"
    )
    run = settings.read_state(checkpoint)
    code = FINISHED
    (folder, _) = scratch.make("generate-")
    try:
        plan = settings.plan_of(tree, words, run, checkpoint, folder, identity, problems)
        given = options.tokenizer or tree.data.tokenizer  # which only a word has set
        size = plan.config.model.vocab_size
        other = options.allow_other_tokenizer
        found = tokenizer.directory_of(given, checkpoint, run, size, other)
        request = request.of_model(found, tokenizer.rows(found, run))
        if identity is None or identity.rank == 0:
            for line in settings.heading(plan, run, checkpoint, damaged):
                say(line)
        code = start(plan, request, folder) if identity is None else rank(plan, request, identity)
        return code
    finally:
        if code == FAULT and identity is None:
            scratch.keep(folder)  # what is said of the fault names a log in there
        else:
            shutil.rmtree(folder, ignore_errors=True)


def start(plan: Plan, request: Request, folder: str) -> int:
    """Start this machine's ranks and wait for them."""
    request.write(folder)
    with Follower(Path(folder, "logs", "rank_0.log")):
        code = local.start(plan, (sys.executable, str(Path(__file__).resolve())))
    if code != FINISHED or former(folder).get("state") != "stopped":
        return code
    if reader_has_gone():
        raise BrokenPipeError
    return INTERRUPTED


def rank(plan: Plan, request: Request, identity: Identity) -> int:
    from mixtrain.interop.generate.run import run  # the first import of torch

    return run(plan, request, identity)


def main() -> int:
    identity = None
    try:
        identity = read_identity()
        if identity and identity.is_ours:
            die_with(int(os.environ[LAUNCHER]))
            plan = local.load_plan()
            return rank(plan, Request.read(plan.config.run_dir), identity)
        return generate(*parse_arguments(), identity)
    except UserError as error:
        if identity is None or identity.local_rank == 0:
            print_problems(error.problems)
        return REFUSED
    except KeyboardInterrupt:  # before the ranks are started, who note it
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(ended(main))
