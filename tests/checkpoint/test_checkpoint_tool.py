"""tools/checkpoint.py lists, verifies and inspects checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from composing import ROOT
from test_parity import EP
from test_resume import INTERVAL, path_of, start

from mixtrain.errors import FINISHED


def tool(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/checkpoint.py", *overrides]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two checkpoints; in the newer one a byte has changed, but not the size."""
    overrides = ["trainer.max_steps=4", INTERVAL, EP + "2"]
    run_dir, codes, log = start(tmp_path_factory.mktemp("trained"), *overrides)
    assert codes == {FINISHED}, log
    shard = path_of(run_dir, 4) / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    return run_dir


def test_list_shows_step_layout_size_and_state(trained):
    done = tool("list", str(trained))
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and lines[0] == ["step", "layout", "size", "state"]
    assert [(line[0], " ".join(line[1:6]), line[7], line[8]) for line in lines[1:]] == [
        ("4", "EP 2 on 2 ranks", "MiB", "valid"),
        ("2", "EP 2 on 2 ranks", "MiB", "valid"),
    ]


def test_hashed_the_damage_is_found_and_named(trained):
    for done in (tool("list", "--full", str(trained)), tool("verify", str(trained))):
        assert (
            done.returncode == 1
            and "__1_0.distcp is damaged: its SHA-256 is not that" in done.stdout
        )
        assert done.stdout.rstrip().endswith("valid")  # the older one
    done = tool("verify", str(path_of(trained, 2)))
    assert (done.returncode, done.stdout) == (0, f"{path_of(trained, 2)}: valid\n")


def test_inspect_shows_tensors_shapes_and_dtypes(trained):
    done = tool("inspect", str(path_of(trained, 2)), "--match", "linear_fc1")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 5 and lines[-1].startswith("4 tensors, ")
    assert lines[0].split(maxsplit=5) == [
        "float32",
        "[4,",
        "8,",
        "192,",
        "64]",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
    ]


@pytest.mark.parametrize("verb", ["list", "verify", "inspect"])
def test_where_there_is_nothing_it_says_so(verb, tmp_path):
    done = tool(verb, str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{tmp_path} is neither a checkpoint nor a directory of some" in done.stderr
