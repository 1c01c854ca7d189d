"""Shell scripts and the Dockerfile: linted, and true to the rest of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from composing import ROOT, plan_of

from mixtrain.launch.script import render

SCRIPTS = [*sorted((ROOT / "slurm").iterdir()), ROOT / ".ci" / "run"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().split()
    if line.count("==") == 1
)


def lint(program: str, *words: str) -> str:
    """What a linter says; the test is skipped where it is not installed (pip install
    mixtrain[dev]).
    """
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(program, path=beside)
    if not found:
        pytest.skip(f"{program} is not installed")
    shown = subprocess.run(
        [found, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return shown.stdout + shown.stderr if shown.returncode else ""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_passes_shellcheck(path):
    assert lint("shellcheck", str(path)) == ""


@pytest.mark.parametrize("words", [
    ['name="it\'s x"'],
    ["launcher.container_image='nvcr.io#nvidia/pytorch:26.06-py3'", "launcher.container_mounts=['/a"
                                                                    " b:/c']"],
], ids=["by hand", "container"])  # fmt: skip
def test_what_is_filled_in_passes_shellcheck_too(tmp_path, words):
    text = render(plan_of(*words), words, tmp_path)
    (tmp_path / "job.sbatch").write_text(text)
    assert lint("shellcheck", str(tmp_path / "job.sbatch")) == ""


def test_every_variable_for_the_ranks_has_a_reason_above_it():
    lines = (ROOT / "slurm" / "env.sh").read_text().splitlines()
    exported = [number for number, line in enumerate(lines) if line.startswith("export ")]
    assert len(exported) >= 8
    for number in exported:
        assert re.match(r"# \w", lines[number - 1]), lines[number]


def test_the_dockerfile_passes_hadolint():
    assert lint("hadolint", "Dockerfile") == ""


def test_the_image_is_nvidias_pytorch_by_digest_and_needs_no_root():
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", base)
    (user,) = re.findall(r"^USER (\d+)", DOCKERFILE, flags=re.MULTILINE)
    assert int(user) > 0
    healthy = re.search(
        r'^HEALTHCHECK .*CMD \["python", "/opt/mixtrain/train\.py", "trainer\.mode=plan"\]$',
        DOCKERFILE,
        re.M,
    )
    assert healthy


def test_the_image_has_the_versions_that_are_tested_together():
    installed = dict(re.findall(r"^\s+([\w-]+)==([\w.]+)", DOCKERFILE, flags=re.MULTILINE))
    assert (
        installed["megatron-core"] == "0.19.2"
        and f"megatron-core=={installed.pop('megatron-core')}"
        in (ROOT / "constraints.txt").read_text()
    )
    assert len(installed) == 5 and installed == {name: PINS[name] for name in installed}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [re.match(r"[\w-]+", one)[0] for one in project["dependencies"]]
    assert {
        *installed,
        "megatron-core",
        "torch",
        "einops",
        "psutil",
        "tensorboard",
        "rich",
        "matplotlib",
    } == set(declared)


def test_what_a_run_leaves_behind_does_not_go_into_the_image():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name in (".git", "runs", "cache", ".venv*"):
        assert name in ignored
    assert not {"conf", "recipes", "mixtrain", "slurm", "train.py", "tools"} & set(ignored)
