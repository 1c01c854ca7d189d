"""Where a plan runs: in a rank, on this machine for one node, in Slurm for several."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from composing import path_without_slurm, plan_of, problems_of, run_train

from mixtrain.config.choices import LauncherType
from mixtrain.launch.choose import chosen_launcher, starts_ranks
from mixtrain.launch.machine_checks import machine_problems
from mixtrain.system.rank_identity import Identity

SEVERAL = ["trainer.num_nodes=2", "trainer.devices=1"]


@pytest.fixture
def with_sbatch(tmp_path, monkeypatch) -> Path:
    """A machine that has sbatch on PATH; these tests do not run it."""
    command = tmp_path / "bin" / "sbatch"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{path_without_slurm()}")
    return command


@pytest.mark.parametrize("overrides, goes_to", [
    ([], LauncherType.local),
    (SEVERAL, LauncherType.slurm),
    (["launcher=slurm"], LauncherType.slurm),
    (["launcher=local", *SEVERAL], LauncherType.local),
])  # fmt: skip
def test_auto_is_this_machine_for_one_node_and_slurm_for_several(with_sbatch, overrides, goes_to):
    assert chosen_launcher(plan_of(*overrides)) is goes_to


def test_without_slurm_several_nodes_are_this_machines_to_refuse(monkeypatch):
    monkeypatch.setenv("PATH", path_without_slurm())
    plan = plan_of(*SEVERAL)
    assert chosen_launcher(plan) is LauncherType.local
    (problem,) = machine_problems(plan, None, SEVERAL)
    assert "no sbatch on PATH" in problem and "torchrun --nnodes 2 --nproc-per-node 1" in problem


def test_slurm_that_is_not_here_is_refused_with_what_to_type(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = run_train("launcher=slurm", cwd=tmp_path)
    assert shown.returncode == 2 and "Traceback" not in shown.stderr
    assert (
        "launcher = slurm, but there is no sbatch on PATH" in shown.stderr
        and "launcher=local" in shown.stderr
    )
    assert os.listdir(tmp_path) == []


def test_slurm_that_does_not_answer_is_said_in_its_own_words(with_sbatch):
    sinfo = with_sbatch.with_name("sinfo")
    sinfo.write_text(
        "#!/bin/sh\necho 'slurm_load_partitions: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    sinfo.chmod(0o755)
    (problem,) = machine_problems(plan_of("launcher=slurm"), None, [])
    assert (
        problem
        == "launcher = slurm, but sinfo does not answer here: Unable to contact slurm controller"
    )


ALONE = Identity(0, 1, 0, 1, "tcp://127.0.0.1:20000")


@pytest.mark.parametrize("identity, overrides, starts", [
    (None, [], True),
    (ALONE, [], False),
    (ALONE, ["launcher=local"], True),
    (ALONE, ["launcher.type=local"], True),
    (Identity(0, 2, 0, 2, "tcp://127.0.0.1:20000"), ["launcher=local"], False),
])  # fmt: skip
def test_the_one_task_of_a_shell_starts_ranks_only_where_it_is_told_to(
    monkeypatch, identity, overrides, starts
):
    monkeypatch.delenv("RANK", raising=False)
    assert starts_ranks(identity, overrides) is starts


def test_a_rank_of_torchrun_is_a_rank_whatever_is_typed(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert not starts_ranks(ALONE, ["launcher=local"])


def test_a_launcher_that_there_is_not_is_offered_the_ones_there_are():
    (problem,) = problems_of("launcher=slrum")
    assert (
        problem
        == "launcher=slrum: did you mean slurm? the options of launcher are auto, local, slurm"
    )
