"""Prove that an exported model is served as it was trained: other programs' greedy tokens are those
of generate.py.

    python tools/verify_serving.py runs/laptop exported
    python tools/verify_serving.py runs/laptop exported --engine vllm=VENV/bin/python --engine
      mlx=VENV2/bin/python
    python tools/verify_serving.py runs/laptop exported --engine llama_cpp=VENV3/bin/python --gguf
      exported.gguf

The checkpoint is continued by tools/generate.py, the export by each engine, in the Python where
that is installed: transformers (in this one, unless told otherwise), vllm, mlx (the package
mlx-lm), llama_cpp (the package xllamacpp, with a file of tools/convert_to_gguf.py). Texts go in:
the tokenizers are compared as well. All compute in fp32.

Exit codes: 0 the same tokens, 1 not, or an engine failed (its last lines are shown); 2 the
arguments are wrong.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import positive_int, run  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, Fault, UserError  # noqa: E402
from mixtrain.system import untrusted_json  # noqa: E402

HERE = Path(__file__).resolve().parent
ENGINES = sorted(path.stem.removeprefix("with_") for path in (HERE / "engines").glob("with_*.py"))
PROMPTS = [
    "def main(",
    "import os",
    "    return",
    "class Stack(object):\n    def push(",
    "x = [1, 22, 333]  # naïve",
]
MOST = 128  # new tokens: the engines are given room for 256, prompt included
MINUTES = 15  # an engine may take; vLLM compiles
SHOWN = 8  # lines of an engine that failed


class Answer(TypedDict):
    """What an engine has written."""

    version: str
    tokens: list[list[int]]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint, or a run directory, as for tools/generate.py"
    )
    parser.add_argument(
        "export_dir", type=Path, help="what tools/convert_megatron_to_hf.py made of it"
    )
    parser.add_argument(
        "--engine",
        action="append",
        type=engine,
        metavar="NAME=PYTHON",
        help=f"NAME: {', '.join(ENGINES)}; several",
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the export for llama_cpp")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="(default: five lines of Python); several"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=20,
        metavar="N",
        help=f"of each prompt, {MOST} at most (default: 20)",
    )
    given = parser.parse_args(words)
    engines = dict(given.engine or [("transformers", sys.executable)])
    refuse(given, engines)
    prompts = given.prompt or PROMPTS
    wanted = continued(given.checkpoint, prompts, given.max_new_tokens)
    end = untrusted_json.read(given.export_dir / "config.json").get("eos_token_id")
    equal = True
    for name, python in engines.items():
        model = given.gguf if name == "llama_cpp" else given.export_dir
        version, found = answered(
            name, python, model, {"prompts": prompts, "max_new_tokens": given.max_new_tokens}
        )
        same = [
            trimmed(ours, end) == trimmed(theirs, end)
            for ours, theirs in zip(wanted, found, strict=True)
        ]
        print(
            f"{name:12} {version:28} {sum(same)} of {len(same)} continuations are the same",
            flush=True,
        )
        for number in (number for number, ok in enumerate(same) if not ok):
            print(f"  {prompts[number]!r}: {found[number]}, tools/generate.py: {wanted[number]}")
        equal &= all(same)
    return FINISHED if equal else FAULT


def engine(word: str) -> tuple[str, str]:
    name, _, python = word.partition("=")
    if name not in ENGINES:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(ENGINES)}")
    return name, python or sys.executable


def refuse(given: argparse.Namespace, engines: dict[str, str]) -> None:
    """UserError with what is missing."""
    if not (given.export_dir / "config.json").is_file():
        raise UserError(
            f"{given.export_dir} has no config.json: an export of tools/convert_megatron_to_hf.py"
            " is wanted"
        )
    if given.max_new_tokens > MOST:
        raise UserError(f"--max-new-tokens {given.max_new_tokens} must be at most {MOST}")
    if ("llama_cpp" in engines) != (given.gguf is not None):
        raise UserError("--engine llama_cpp and --gguf FILE go together: llama.cpp reads that file")
    if given.gguf and not given.gguf.is_file():
        raise UserError(f"--gguf {given.gguf}: no such file; tools/convert_to_gguf.py makes one")
    for name, python in engines.items():
        if not Path(python).is_file():
            raise UserError(
                f"--engine {name}={python}: no such file; the Python where it is installed is"
                " wanted"
            )


def continued(checkpoint: Path, prompts: list[str], most: int) -> list[list[int]]:
    """The new tokens of each prompt that tools/generate.py chooses."""
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    command = [
        sys.executable,
        HERE / "generate.py",
        checkpoint,
        "--json",
        "--max-new-tokens",
        str(most),
        *words,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60 * MINUTES, check=False
    )
    if done.returncode:
        raise Fault(
            f"tools/generate.py ended with exit code {done.returncode}:\n{last(done.stderr)}"
        )
    return [untrusted_json.parse(line)["tokens"] for line in done.stdout.splitlines()]


def answered(name: str, python: str, model: Path, request: dict) -> tuple[str, list[list[int]]]:
    """(the engine's version, the new tokens of each prompt)."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "request.json")
        answer = Path(folder, "answer.json")
        asked.write_text(json.dumps(request))
        command = [python, HERE / "engines" / f"with_{name}.py", model, asked, answer]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=60 * MINUTES, check=False
            )
        except subprocess.TimeoutExpired:
            raise Fault(f"{name} has not answered after {MINUTES} minutes") from None
        if not answer.is_file():
            raise Fault(
                f"{name} ended with exit code {done.returncode}:\n{last(done.stdout + done.stderr)}"
            )
        values = untrusted_json.read(answer, Answer)
    return values["version"], values["tokens"]


def trimmed(tokens: list[int], ends: int | list[int] | None) -> list[int]:
    """Without the token that ends a text: an engine may leave it out."""
    ends = ends if isinstance(ends, list) else [ends]
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def last(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-SHOWN:])


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
