"""A wheel of mixtrain, installed in a folder of its own, plans and trains from any folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from composing import ROOT

pytestmark = pytest.mark.long
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where the wheel is installed. Its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True, timeout=120)
    wheel = [*PIP, "wheel", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(wheel, check=True, timeout=300)
    (path,) = folder.glob("mixtrain-*.whl")
    target = folder / "site"
    subprocess.run(
        [*PIP, "install", "--no-deps", "--target", str(target), str(path)], check=True, timeout=300
    )
    return target


def run(installed, command: str, *words: str, cwd) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    program = [sys.executable, str(installed / "bin" / command), *words]
    return subprocess.run(
        program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_every_command_prints_its_help(installed, tmp_path):
    commands = sorted(path.name for path in (installed / "bin").glob("mixtrain-*"))
    assert len(commands) == 12 and "mixtrain-train" in commands
    for command in commands:
        result = run(installed, command, "--help", cwd=tmp_path)
        assert result.returncode == 0, (command, result.stderr)
        assert "usage" in result.stdout or "python train.py" in result.stdout


def test_it_plans_and_trains_from_another_folder(installed, tmp_path):
    plan = run(
        installed, "mixtrain-train", "+recipe=mixtral_8x7b_ep8", "trainer.mode=plan", cwd=tmp_path
    )
    assert plan.returncode == 0, plan.stderr
    assert "256 experts (32 layers x 8)" in plan.stdout
    words = ["+recipe=mixtral_8x7b_ep8", "+shrink=laptop", "trainer.max_steps=2", "data=mock"]
    words += ["parallel.expert_model_parallel_size=2", "data.seq_length=64"]
    trained = run(installed, "mixtrain-train", *words, cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (tmp_path / "runs" / "mixtral_8x7b_ep8-laptop" / "metrics.jsonl").is_file()
    job = run(installed, "mixtrain-submit", "--print", "+recipe=mixtral_8x7b_ep8", cwd=tmp_path)
    assert f"MIXTRAIN_ROOT={installed / 'mixtrain' / 'share'}" in job.stdout
