"""The benchmark at tiny sizes: real processes, real transformers, in turn."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from composing import ROOT, unstarted_environment

from mixtrain.errors import Fault, UserError
from mixtrain.proof.bench import run
from mixtrain.proof.bench.processes import VariantProcesses
from mixtrain.proof.bench.readings import Reading
from mixtrain.proof.bench.scenario import BenchRequest, Measure, Scenario, ScenarioRow
from mixtrain.proof.bench.variants import variants_of
from mixtrain.system.host_memory import SETTINGS

TINY = [
    "data=mock",
    "parallel=ep1",
    "router=none",
    "checkpoint=none",
    "data.seq_length=32",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=4",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.moe_ffn_hidden_size=96",
    "model.vocab_size=256",
    "model.init_method_std=0.1",
]


def taken(folder, measure: Measure, rounds: int = 2, **variants: list[str]) -> list[Reading]:
    """Return the readings of a row of these variants."""
    row = ScenarioRow(measure, variants=variants)
    scenario = Scenario(
        rounds, repeats=1, warmup=1, resident=True, threads=1, patience_seconds=0, words=TINY
    )
    rows, _ = variants_of(BenchRequest("made", replace(scenario, rows={"row": row}), [], None))
    return list(run.readings_of("row", row, rows["row"], scenario, folder, print))


@pytest.mark.long
def test_ours_and_transformers_take_turns_with_the_same_loss_and_gradient(tmp_path):
    """The benchmark itself checks that they compute the same: see the tests below."""
    variants = {
        "torch": [],
        "hf_eager": ["hf.experts_implementation=eager"],
        "ep2": ["parallel=ep2"],
    }
    found = taken(tmp_path, Measure.forward_backward, **variants)
    assert [(one.round, one.variant) for one in found] == [
        (number, name) for number in (1, 2) for name in variants
    ]
    assert all(one.seconds > 0 and one.cpu_seconds > 0 and one.amount == 4 * 32 for one in found)
    assert [one.ranks for one in found[:3]] == [1, 1, 2]
    assert all(one.peak_bytes > 1 << 20 and one.flops_whole > one.flops_causal for one in found)


def environment_of(child: subprocess.Popen) -> dict[str, str]:
    """Return a child's environment, which is its own only shortly after Popen returns."""
    ends = time.monotonic() + 20
    while not (found := psutil.Process(child.pid).environ()) and time.monotonic() < ends:
        time.sleep(0.01)
    return found


def test_a_variant_can_be_without_our_memory_settings(tmp_path, monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    row = ScenarioRow(
        Measure.forward_backward, variants={"with": [], "without": ["host.memory_settings=false"]}
    )
    words = [word for word in TINY if not word.startswith("parallel=")]
    scenario = Scenario(1, 1, 0, True, None, 0, words=[*words, "parallel=ep2"], rows={"row": row})
    rows, _ = variants_of(BenchRequest("made", scenario, [], None))
    seen = []
    for variant in rows["row"]:
        processes = VariantProcesses(variant, scenario, tmp_path / variant.name)
        with contextlib.suppress(KeyboardInterrupt), processes:
            given = environment_of(processes.children[1])
            seen.append([name for name in SETTINGS if name in given])
            raise KeyboardInterrupt  # they are killed
    assert seen == [list(SETTINGS), []]
    row.variants["other"] = ["host.threads=3"]
    with pytest.raises(UserError, match=r"row, other: the only key of host\. is"):
        variants_of(BenchRequest("made", scenario, [], None))


@pytest.mark.long
def test_a_variant_of_another_model_ends_the_benchmark_before_it_is_timed(tmp_path):
    with pytest.raises(
        Fault, match=r"row: other does not compute what torch does: LM loss \S+ against"
    ):
        taken(tmp_path, Measure.forward_backward, torch=[], other=["model.rotary_base=10"])


@pytest.mark.long
def test_saving_is_timed_against_plain_files_of_as_many_bytes(tmp_path):
    saved, plain = taken(
        tmp_path, Measure.save, rounds=1, save=["checkpoint=last"], plain_files=["plain.files=2"]
    )
    assert saved.amount == pytest.approx(plain.amount, abs=2) and saved.unit == "bytes"
    assert list((tmp_path / "0" / "save").glob("rank_0/iter_*/.metadata"))


def test_commands_are_timed_to_their_end_or_to_a_line(tmp_path):
    row = ScenarioRow(Measure.command, variants={}, prepare="echo ready > {shared}/file")
    slow = 'cat {shared}/file; echo seen; sleep 1; test -z "$(ls {folder})"'
    scenario = Scenario(
        1,
        1,
        0,
        True,
        None,
        0,
        rows={"row": ScenarioRow(Measure.command, variants={"slow": [slow]})},
    )
    rows, _ = variants_of(BenchRequest("made", scenario, [], None))
    # seconds for which the command continues after the timed line
    for until, left in (("^seen", 1), (None, 0)):
        row.until = until
        began = time.perf_counter()
        (found,) = run.readings_of("row", row, rows["row"], scenario, tmp_path / str(until), print)
        assert 0 < found.seconds <= time.perf_counter() - began - left, found
        assert until or found.seconds >= 1
    row.until = "^never"
    with pytest.raises(Fault, match="slow: no line of its output matches"):
        list(run.readings_of("row", row, rows["row"], scenario, tmp_path / "never", print))


@pytest.mark.long
def test_a_variant_that_ends_while_it_waits_is_a_fault_with_its_exit_code(tmp_path):
    row = ScenarioRow(Measure.step, variants={"torch": [], "ep2": ["parallel=ep2"]})
    scenario = Scenario(
        2, repeats=1, warmup=1, resident=True, threads=1, patience_seconds=0, words=TINY
    )
    rows, _ = variants_of(BenchRequest("made", replace(scenario, rows={"row": row}), [], None))
    readings = run.readings_of("row", row, rows["row"], scenario, tmp_path, print)
    next(readings)
    (killed,) = [child for child in workers() if "ep2/rank_1" in " ".join(child.cmdline())]
    killed.kill()
    with pytest.raises(Fault, match="ep2: rank 1 ended with exit code -9"):
        list(readings)
    assert workers() == []


def workers() -> list[psutil.Process]:
    """Return the running worker processes of variants."""
    there = [
        child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE
    ]
    return [child for child in there if "mixtrain.proof.bench.worker" in child.cmdline()]


def is_rank(process: psutil.Process) -> bool:
    """Return a process of the training that the tool has started."""
    try:
        return "RANK" in process.environ()
    except psutil.Error:
        return False


def test_an_interrupted_command_leaves_no_process(tmp_path):
    words = [
        "scenario=start_up",
        "rows=[first_loss]",
        "rounds=1",
        f"folder={tmp_path}",
        f"csv={tmp_path}/file.csv",
    ]
    tool = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "bench.py"), *words],
        env=unstarted_environment(),
        start_new_session=True,
    )
    own = psutil.Process(tool.pid)
    deadline = time.monotonic() + 120
    while not any(map(is_rank, started := own.children(recursive=True))):
        assert time.monotonic() < deadline and tool.poll() is None
        time.sleep(0.05)
    tool.send_signal(signal.SIGINT)
    assert tool.wait(timeout=120) == 130
    assert psutil.wait_procs(started, timeout=120)[1] == []
    assert list(tmp_path.glob("working-*")) == []


@pytest.mark.long
def test_the_command_prints_a_table_and_leaves_a_file_that_it_shows_again(tmp_path):
    words = [
        "scenario=cpu_small",
        "rows=[step_bf16]",
        "variants=[torch]",
        "rounds=1",
        "patience_seconds=0",
        "resident=false",
        *TINY[4:],
    ]
    tool = [sys.executable, str(ROOT / "tools" / "bench.py")]
    file = str(tmp_path / "file.csv")
    shown = []
    for arguments in ([*words, f"csv={file}"], ["show", file]):
        done = subprocess.run(
            [*tool, *arguments],
            cwd=tmp_path,
            env=unstarted_environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout.splitlines())
    assert [line for line in shown[0][:-2]] == shown[1] and shown[0][-1] == file
    assert "step_bf16: 1 round, " in "\n".join(shown[1]) and max(map(len, shown[0][:-1])) <= 100
