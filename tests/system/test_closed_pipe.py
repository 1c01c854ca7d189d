"""Whoever stops reading a command's output gets no traceback, and the command ends as other tools
of Unix do.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

import pytest
from composing import ROOT

from mixtrain import cli
from mixtrain.system import closed_pipe, console

COMMANDS = {
    "train.py": ["trainer.mode=plan"],
    "tools/submit.py": ["trainer.num_nodes=2", "--print"],
    "tools/checkpoint.py": ["list", "RUN"],
    "tools/drill.py": ["--list"],
    "tools/bench.py": ["show", "benchmarks/cpu_small.csv"],
    "tools/preprocess_data.py": ["--help"],
    "tools/generate.py": ["--help"],
    "tools/parity.py": ["--help"],
    "tools/convert_hf_to_megatron.py": ["--help"],
    "tools/convert_megatron_to_hf.py": ["--help"],
    "tools/convert_to_gguf.py": ["--help"],
    "tools/convert_tokenizer.py": ["--help"],
    "tools/verify_conversion.py": ["--help"],
    "tools/verify_serving.py": ["--help"],
}


def code_of(call, closed=(1,)) -> tuple[int, str]:
    """(how a process that makes the call ends, as subprocess has it, its stderr); the `closed`
    files nobody reads.
    """
    unread = os.pipe()
    errors = os.pipe()
    os.close(unread[0])
    if not (child := os.fork()):
        code = 99
        try:
            for stream in (1, 2):
                os.dup2(unread[1] if stream in closed else errors[1], stream)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            code = call()
            sys.stdout.flush()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            os._exit(code)
    os.close(unread[1])
    os.close(errors[1])
    with open(errors[0]) as message:
        text = message.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def run_script(name: str, words: list[str], monkeypatch) -> int:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(ROOT / name), *words])
    runpy.run_path(str(ROOT / name), run_name="__main__")
    return 0


def test_every_command_is_listed():
    developers = {"tools/mutants.py", "tools/mutations.py", "tools/mutant_plugins.py"}
    assert set(COMMANDS) | developers == {"train.py"} | {
        f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_reader_has_gone_ends_by_sigpipe_without_a_word(
    name, tmp_path, monkeypatch
):
    (tmp_path / "iter_0000001").mkdir()
    words = [str(tmp_path) if word == "RUN" else word for word in COMMANDS[name]]
    code, message = code_of(lambda: run_script(name, words, monkeypatch))
    assert code == -signal.SIGPIPE
    assert "Traceback" not in message and "BrokenPipe" not in message


@pytest.mark.parametrize("main", [
    lambda words: print("x" * 1_000_000) or 0,  # more than a buffer holds
    lambda words: print("x") or 0,  # written as the process ends
    lambda words: console.Console().print("x") or 0,
    lambda words: sys.exit(print("x")),
])  # fmt: skip
def test_it_is_the_same_however_it_is_printed(main):
    assert code_of(lambda: cli.run(main, [])) == (-signal.SIGPIPE, "")


def test_a_problem_that_nobody_reads_ends_by_sigpipe_too():
    def refuse(words: list[str]) -> int:
        raise cli.UserError("x is wrong")

    assert code_of(lambda: cli.run(refuse, []), closed=(1, 2))[0] == -signal.SIGPIPE


def test_a_pipe_to_somebody_else_is_another_fault():
    def write_to_a_child(words: list[str]) -> int:
        gone, here = os.pipe()
        os.close(gone)
        os.write(here, b"x")
        return 0

    def call() -> int:
        try:
            return cli.run(write_to_a_child, [])
        except BrokenPipeError:
            return 7

    assert code_of(call, closed=())[0] == 7


def test_what_is_read_to_its_end_ends_as_ever():
    assert code_of(lambda: closed_pipe.run_main(lambda: 3), closed=())[0] == 3
