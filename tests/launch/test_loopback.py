"""Ranks that cannot exchange tensors are not started."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from composing import ROOT, unstarted_environment

from mixtrain.engine import process_groups
from mixtrain.errors import REFUSED, UserError
from mixtrain.system.rank_identity import INTERFACES, Identity, interface_problem


def test_an_interface_that_is_up_is_no_problem_and_one_that_is_missing_is_named():
    assert interface_problem("lo") == "" and interface_problem("") == ""
    problem = interface_problem("lo,ib7")
    assert problem.startswith(
        f"the ranks connect over the network interface ib7 ({INTERFACES}), which this machine lacks"
    )
    assert "(it has lo" in problem and problem.endswith(f"{INTERFACES}=NAME selects another")


def test_a_rank_that_somebody_else_has_started_does_not_wait_for_an_interface_that_is_not_there(
    monkeypatch,
):
    monkeypatch.setenv(INTERFACES, "ib7")
    with (
        pytest.raises(UserError, match="ib7"),
        process_groups.start(None, Identity(0, 2, 0, 1, "env://")),
    ):
        pass


def test_without_a_loopback_interface_a_run_is_refused_before_its_ranks_start(tmp_path):
    alone = [str(shutil.which("unshare")), "--net", "--map-root-user"]
    if (
        alone[0] == "None"
        or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("makes a network of its own")
    done = subprocess.run(
        [
            *alone,
            sys.executable,
            "train.py",
            f"run_dir={tmp_path}/run",
            "data=mock",
            "data.seq_length=32",
        ],
        cwd=ROOT,
        env=unstarted_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == REFUSED
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("  - ")]
    assert (
        "the network interface lo (GLOO_SOCKET_IFNAME), which is down: `ip link set lo up` as root"
        in line
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
