"""Paths that a job's container would not see, and missing mounts, are refused before submission."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import plan_of

from mixtrain.errors import UserError
from mixtrain.launch.checks import container_problems
from mixtrain.launch.containers import (
    Mount,
    hidden_path_problems,
    mounts_of,
    on_host,
    parse_mount,
    with_host_paths,
)

ROOT = Path("/opt/mixtrain")
FOLDER = Path("/home/me/work")
IMAGE = "launcher.container_image='nvcr.io#nvidia/pytorch:26.06-py3'"
INDEXED = [
    "data=indexed",
    "data.seq_length=128",
    "data.data_path=[1,/data/a,2,/data/b]",
    "data.tokenizer=/data/tokens",
]


def config_of(*overrides: str):
    return plan_of(IMAGE, *overrides).config


@pytest.mark.parametrize("text, mount", [
    ("/data", Mount("/data", "/data")),
    ("/lustre/me:/data", Mount("/lustre/me", "/data")),
    ("/lustre/me:/data:ro", Mount("/lustre/me", "/data", "ro")),
])  # fmt: skip
def test_a_mount_is_read_and_written_as_pyxis_takes_it(text, mount):
    assert parse_mount(text) == mount and str(mount).endswith(text)


@pytest.mark.parametrize("text", ["data", "/a:b", "/a:/b:ro:x", "/a:", ""])
def test_what_is_no_mount_is_refused_with_the_key(text):
    with pytest.raises(UserError, match="launcher.container_mounts: "):
        parse_mount(text)


@pytest.mark.parametrize("path, host", [
    ("/data/x/y", "/lustre/me/x/y"),
    ("/data", "/lustre/me"),
    ("/data/../data/x", "/lustre/me/x"),
    ("/data/deep/x", "/fast/x"),  # in the innermost mount
    ("/database", None),
    ("/data/../etc", None),
])  # fmt: skip
def test_a_path_of_the_container_is_found_on_the_host(path, host):
    assert on_host(path, [Mount("/lustre/me", "/data"), Mount("/fast", "/data/deep")]) == host


def test_every_path_of_the_run_must_lie_in_a_mount():
    config = config_of(
        *INDEXED, "run_dir=/scratch/run", "checkpoint.load_weights=/old/iter_0000001"
    )
    found = list(hidden_path_problems(config, FOLDER, mounts_of(config, FOLDER, ROOT)))
    keys = [problem.split(" ")[0] for problem in found]
    assert keys == [
        "run_dir",
        "checkpoint.load_weights",
        "data.tokenizer",
        "data.data_path",
        "data.data_path",
    ]
    assert found[0].endswith("add /scratch to them")
    seen = config_of(*INDEXED, "run_dir=runs/x", "launcher.container_mounts=[/data]")
    assert list(hidden_path_problems(seen, FOLDER, mounts_of(seen, FOLDER, ROOT))) == []


def test_data_is_looked_for_where_it_is_on_the_host():
    config = config_of(
        *INDEXED, "run_dir=/data/run", "launcher.container_mounts=['/lustre/me:/data']"
    )
    there = with_host_paths(config, FOLDER, mounts_of(config, FOLDER, ROOT))
    assert there.data.data_path == ["1", "/lustre/me/a", "2", "/lustre/me/b"]
    assert (there.data.tokenizer, there.run_dir) == ("/lustre/me/tokens", "/lustre/me/run")


def test_an_image_or_a_folder_that_does_not_exist_is_named_with_its_key(tmp_path):
    overrides = [f"run_dir={tmp_path}/run", f"launcher.container_mounts=[{tmp_path},/no/such]"]
    problems = list(
        container_problems(plan_of(*overrides, "launcher.container_image=./m.sqsh"), tmp_path)
    )
    assert problems == [
        "launcher.container_image = ./m.sqsh: no such file; docs/cluster.md says how to make one",
        "launcher.container_mounts: /no/such does not exist on this machine",
    ]
    (tmp_path / "m.sqsh").write_text("")
    assert (
        len(
            list(
                container_problems(
                    plan_of(*overrides, "launcher.container_image=./m.sqsh"), tmp_path
                )
            )
        )
        == 1
    )
    # an image in a registry is not checked
    assert len(list(container_problems(plan_of(*overrides, IMAGE), tmp_path))) == 1
