"""A run continues without its console, and Ctrl-C stops it whatever its output is piped into."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from composing import ROOT, plan_of
from terminals import Terminal
from test_closed_pipe import code_of
from test_launch import SMALL, lm_losses

from mixtrain.system import streams
from mixtrain.system.status import read_status
from mixtrain.training.logs import Logs
from mixtrain.training.signals import StopRequest, exit_on_request

PRINTS = """
import sys
from pathlib import Path
from mixtrain.system import streams
streams.reserve()
streams.make_tolerant()
print('early')
run = Path(sys.argv[1])
run.mkdir()
streams.make_tolerant(run / 'logs' / 'console.log')
file = open(run / 'records', 'w')
for number in range(3): print('line', number)
print('problem', file=sys.stderr)
file.close()
sys.exit(3)
"""
LOST = {
    "a reader that has gone": "| true",
    "a reader of both that has gone": "2>&1 | true",
    "a full disk": "> /dev/full",
    "closed": ">&-",
    "both closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
}


@pytest.mark.parametrize("name", LOST)
def test_what_standard_output_does_not_take_is_in_the_log_and_said_once(name, tmp_path):
    command = f'sleep 0.3; {sys.executable} -c "$CODE" {tmp_path}/run; echo $? > {tmp_path}/code'
    done = subprocess.run(
        ["bash", "-c", f"({command}) {LOST[name]}"],
        cwd=ROOT,
        env={"CODE": PRINTS, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (tmp_path / "code").read_text() == "3\n"
    notice, *lines = (tmp_path / "run" / "logs" / "console.log").read_text().splitlines()
    both = "2>&" in LOST[name]
    assert notice.startswith("warning: standard output is lost (")
    assert lines == ["early", "line 0", "line 1", "line 2", *["problem"] * both]
    assert done.stderr == ("" if both else f"{notice}\nproblem\n")
    assert (tmp_path / "run" / "records").read_text() == ""  # which has got no stream's place


def test_a_log_that_nobody_reads_asks_no_run_to_stop(tmp_path):
    def call() -> int:
        streams.make_tolerant(tmp_path / "run" / "logs" / "console.log")
        with (
            StopRequest() as stop,
            Logs(plan_of(f"run_dir={tmp_path}/run"), writes=True, config_yaml="") as log,
        ):
            log.say("x" * 100_000)
            log.say("y")
            return 6 if stop.signals else 5

    code, said = code_of(call)
    assert code == 5 and said.count("\n") == 1 and "standard output is lost (Broken pipe)" in said
    assert (tmp_path / "run" / "logs" / "console.log").read_text() == f"{said}{'x' * 100_000}\ny\n"


def train(folder: Path, *words: str) -> str:
    words = (
        *SMALL,
        "trainer.devices=1",
        "parallel.expert_model_parallel_size=1",
        "checkpoint.save_interval=null",
        *words,
    )
    quoted = " ".join(f"'{word}'" for word in words)
    here = f"run_dir={folder}/run data.path_to_cache={folder}/cache"
    return f"env OMP_NUM_THREADS=1 {sys.executable} train.py {here} {quoted}"


def step_of(folder: Path) -> int:
    return (
        (read_status(folder / "run") or {"step": -1})["step"] if (folder / "run").exists() else -1
    )


def console_log(folder: Path) -> str:
    return (folder / "run" / "logs" / "console.log").read_text()


some = [(name, pytest.mark.long) for name in ("closed", "a full disk", "both closed")]


@pytest.mark.parametrize(
    "rest", ["| grep -m1 step", *[pytest.param(LOST[name], marks=mark) for name, mark in some]]
)
def test_a_run_goes_on_to_its_end_without_its_console(rest, tmp_path):
    with Terminal(train(tmp_path, "trainer.max_steps=4"), rest, tmp_path) as shell:
        assert shell.exit_code() == 0, shell.text
    assert read_status(tmp_path / "run")["state"] == "finished"
    assert (tmp_path / "run" / "iter_0000004").is_dir()
    assert console_log(tmp_path).count("standard output is lost") == 1
    assert "finished after 4 of 4 steps" in console_log(tmp_path)
    assert ("warning: standard output is lost" in shell.text) == ("2>" not in rest)


@pytest.mark.long
@pytest.mark.parametrize("rest", ["| tee LOG", "2>&1 | tee LOG"])
def test_ctrl_c_of_a_run_that_is_piped_into_tee_stops_it_with_a_checkpoint_that_goes_on(
    rest, tmp_path
):
    """In a terminal Ctrl-C reaches the whole pipeline: tee dies of it."""
    words = ["trainer.max_steps=60", "trainer.val_check_interval=60"]
    (here, whole) = (tmp_path / "a", tmp_path / "b")
    for folder in (here, whole):
        folder.mkdir()
    with Terminal(train(here, *words), rest.replace("LOG", f"{here}/log"), here) as shell:
        shell.wait_until(lambda: step_of(here) >= 3)
        shell.press_ctrl_c()
        assert shell.exit_code() == 0, shell.text
    status = read_status(here / "run")
    assert (status["state"], status["reason"]) == ("stopped", "stopped by SIGINT")
    assert 3 <= status["step"] < 60 and (here / "run" / f"iter_{status['step']:07d}").is_dir()
    assert f"stopped after {status['step']} of 60 steps" in console_log(here)
    for folder in (here, whole):
        subprocess.run(
            ["bash", "-c", train(folder, *words)],
            cwd=ROOT,
            capture_output=True,
            timeout=200,
            check=True,
        )
    assert lm_losses(here) == lm_losses(whole) and len(lm_losses(whole)) == 60


@pytest.mark.long
@pytest.mark.parametrize("nohup, state", [("", "stopped"), ("nohup ", "finished")])
def test_a_terminal_that_is_closed_stops_a_run_unless_nohup_has_it_go_on(nohup, state, tmp_path):
    words = ["trainer.max_steps=100", "trainer.val_check_interval=100"]
    with Terminal(nohup + train(tmp_path, *words), "2>&1 | cat", tmp_path) as shell:
        shell.wait_until(lambda: step_of(tmp_path) >= 3)
        shell.hang_up()
        shell.wait_until(lambda: read_status(tmp_path / "run")["state"] != "running")
    status = read_status(tmp_path / "run")
    assert status["state"] == state, json.dumps(status)
    assert (tmp_path / "run" / f"iter_{status['step']:07d}").is_dir()


def test_a_bar_is_not_drawn_into_the_log_of_a_terminal_that_has_gone(tmp_path):
    log = tmp_path / "run" / "logs" / "console.log"
    code = (
        "import os, time, composing\n"
        "from mixtrain.system import streams\n"
        "from mixtrain.training.logs import Logs\n"
        f"streams.make_tolerant({str(log)!r}); plan = composing.plan_of('run_dir={tmp_path}/run')\n"
        "with Logs(plan, True, '') as log:\n"
        "    log.begin(0)\n"
        f"    while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.1)\n"
        "    for number in range(20): time.sleep(0.1); log.say(f'line {number}')\n"
        f"open({str(tmp_path / 'ended')!r}, 'w')\n"
    )
    (tmp_path / "code.py").write_text(code)
    path = f"PYTHONPATH={ROOT}:{ROOT}/tests TERM=xterm"
    with Terminal(
        f"trap '' HUP; {path} {sys.executable} {tmp_path}/code.py", "", tmp_path
    ) as shell:
        shell.wait_until(lambda: "training" in shell.text, 60)
        shell.hang_up()
        (tmp_path / "go").touch()
        shell.wait_until((tmp_path / "ended").exists, 60)
    text = log.read_text()
    assert text.startswith("warning: standard output is lost (Input/output error)")
    assert [f"line {number}" in text for number in range(20)] == [True] * 20
    # of what was being written as it was lost
    assert "\x1b" not in text and text.count("training") <= 2


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_a_refusal_that_cannot_be_said_is_one_all_the_same(closed):
    command = f"{sys.executable} train.py trainer.max_stepz=5 {closed}"
    assert (
        subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=60, check=False
        ).returncode
        == 2
    )


def test_ctrl_c_before_there_is_a_run_ends_it_also_where_its_word_has_no_reader():
    def call() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exit_on_request()
        os.kill(os.getpid(), signal.SIGINT)
        return 5

    assert code_of(call, closed=(1, 2)) == (0, "")
