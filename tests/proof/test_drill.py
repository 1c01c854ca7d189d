"""A shortened drill: real runs are broken and resumed, and a wrong result fails."""

from __future__ import annotations

import subprocess
import sys

import pytest
from composing import ROOT, unstarted_environment

from mixtrain.proof.drill import scenarios
from mixtrain.proof.drill.arena import Arena
from mixtrain.proof.drill.runs import records

SHORT = ["sigkill_at_random", "flipped_byte", "nan_loss"]


def drill(*words: str, timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/drill.py", *words],
        cwd=ROOT,
        env=unstarted_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.long
def test_a_shortened_drill_passes(tmp_path):
    done = drill("--folder", str(tmp_path), "--kills", "2", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("3 of 3 as expected\n") and done.stdout.count("pass  ") == 3
    assert done.stdout.count("expected  ") == done.stdout.count("seen      ") == 3
    # the same runs compared with a reference in which one number was changed: they differ
    metrics = tmp_path / "reference" / "run" / "metrics.jsonl"
    arena = Arena(tmp_path / "flipped_byte", metrics.parent, seed=0, kills=2)
    assert arena.has_reference_metrics(20) and len(records(arena.run_dir)) == 20
    metrics.write_text(metrics.read_text().replace('"grad_norm": ', '"grad_norm": 1', 1))
    assert not arena.has_reference_metrics(20)


def test_every_scenario_says_in_a_line_what_is_expected():
    names = [scenario.__name__ for scenario in scenarios.SCENARIOS]
    assert len(set(names)) == len(names) and set(SHORT) <= set(names)
    assert all(
        scenario.__doc__ and "\n" not in scenario.__doc__ for scenario in scenarios.SCENARIOS
    )
    shown = drill("--list")
    assert (
        shown.returncode == 0 and [line.split()[0] for line in shown.stdout.splitlines()] == names
    )


@pytest.mark.parametrize("words", [["no_such_scenario"], ["sigterm", "sigtrem"]])
def test_a_scenario_that_is_not_there_is_named(words):
    done = drill(*words)
    assert (
        done.returncode == 2
        and f"{words[-1]} is not a scenario" in done.stderr
        and "Traceback" not in done.stderr
    )
