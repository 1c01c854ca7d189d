"""What this machine cannot run is refused, with what to type; the environment identifies a rank."""

from __future__ import annotations

import os
import shlex
import shutil
import struct
from types import SimpleNamespace

import pytest
from composing import path_without_slurm, plan_of

from mixtrain.data.index import HEADER, MAGIC
from mixtrain.errors import FINISHED, REFUSED
from mixtrain.launch.machine_checks import gpu_count, installed, machine_problems
from mixtrain.system.rank_identity import Identity, read_identity
from train import main

RECIPE = "+recipe=mixtral_8x7b_ep8"
INDEXED = ["data=indexed", "data.seq_length=128"]
OF_TRAINER = [
    "trainer.max_steps=9",
    "trainer.recompute_granularity=null",
    "trainer.recompute_method=null",
]
OF_TRAINER += ["trainer.recompute_num_layers=null"]
OF_MODEL = [
    "num_layers=null",
    "hidden_size=128",
    "ffn_hidden_size=256",
    "num_attention_heads=8",
    "kv_channels=16",
]
OF_MODEL += [
    "moe_ffn_hidden_size=256",
    "vocab_size=1024",
    "max_position_embeddings=128",
    "hf_model=null",
]


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No started ranks, no GPU, no Slurm, and an empty directory."""
    for name in list(os.environ):
        if (
            name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            or "LOCAL_" in name
            or "SLURM" in name
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", path_without_slurm())
    monkeypatch.chdir(tmp_path)


def refused(*overrides: str, identity: Identity | None = None) -> list[str]:
    return machine_problems(plan_of(*overrides), identity, list(overrides))


def rank(number: int, world: int) -> Identity:
    return Identity(number, world, number, world, "tcp://first:29500")


def test_the_default_runs_on_a_bare_machine():
    assert refused() == []
    assert refused(identity=rank(0, 2)) == refused(identity=rank(1, 2)) == []


def test_missing_gpus_are_counted_with_both_ways_to_go_on():
    (problem,) = refused(RECIPE, "trainer.num_nodes=1", "trainer.device_memory_gib=null")
    for fragment in (
        "accelerator = gpu",
        "trainer.devices = 8",
        "0 GPUs",
        "trainer.mode=plan",
        "+shrink=laptop",
    ):
        assert fragment in problem


ANY_MEMORY = "trainer.device_memory_gib=null"  # node8 recomputes nothing


@pytest.mark.parametrize(
    "overrides, on_cpu",
    [
        ([RECIPE], [RECIPE, "+shrink=laptop"]),
        ([RECIPE, "trainer.num_nodes=2"], [RECIPE, "+shrink=laptop"]),
        (
            ["trainer.num_nodes=2", RECIPE, "name='two words'"],
            [RECIPE, "+shrink=laptop", "name='two words'"],
        ),
        ([RECIPE, "+shrink=laptop", "trainer.accelerator=gpu"], [RECIPE, "+shrink=laptop"]),
        (
            [RECIPE, "data=indexed", "data.data_path=[x]", "data.tokenizer=y"],
            [RECIPE, "+shrink=laptop"],
        ),
        (
            ["trainer.accelerator=gpu", "trainer.mode=train"],
            ["trainer.mode=train", "trainer.accelerator=cpu"],
        ),
        (["trainer=node8"], ["trainer=node8", "trainer.accelerator=cpu"]),
        (
            [RECIPE, "trainer=node8", "trainer.num_nodes=2", ANY_MEMORY, *OF_TRAINER],
            [RECIPE, "+shrink=laptop", ANY_MEMORY, *OF_TRAINER],
        ),
        (
            [RECIPE, "model=mixtral_8x7b"],
            [
                RECIPE,
                "+shrink=laptop",
                "model=mixtral_8x7b",
                *[f"model.{word}" for word in OF_MODEL],
            ],
        ),
    ],
)
def test_what_is_advised_where_there_are_no_gpus_can_be_typed_and_is_not_refused(overrides, on_cpu):
    (problem,) = [line for line in refused(*overrides) if line.startswith("trainer.accelerator")]
    plan, cpu = [shlex.split(part.split(";")[0]) for part in problem.split("python train.py ")[1:]]
    assert main(plan) == FINISHED and plan[-1] == "trainer.mode=plan"
    assert cpu == on_cpu
    assert refused(*cpu) == []
    assert main([*cpu, "trainer.mode=plan"]) == FINISHED


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_a_gpu_that_is_hidden_is_not_there(monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpu_count() == 0


def test_a_package_is_found_without_importing_it():
    assert installed("pytest") and not installed("no_such_package")


@pytest.mark.skipif(installed("transformer_engine"), reason="the package is installed here")
def test_transformer_engine_that_is_not_installed_is_named_with_the_way_to_get_it():
    (problem,) = refused("model.transformer_impl=transformer_engine")
    for fragment in (
        "transformer-engine",
        "not installed",
        "mixtrain[gpu]",
        "model.transformer_impl=torch",
    ):
        assert fragment in problem


def test_a_run_directory_without_a_run_is_taken_and_a_file_is_not(tmp_path):
    (tmp_path / "logs").mkdir()
    assert refused(f"run_dir={tmp_path}") == []
    (tmp_path / "file").write_text("")
    (problem,) = refused(f"run_dir={tmp_path}/file")
    assert problem == f"run_dir = {tmp_path}/file is a file; give another run_dir"


@pytest.mark.parametrize(
    "directory, why",
    [
        ("file", "it is not a directory"),
        ("file/x", "Not a directory"),
        ("dangling", "it is not a directory"),
        ("long" * 75, "File name too long"),
    ],
)
@pytest.mark.parametrize("kind", ["mock", "stdlib"])
def test_a_cache_that_cannot_be_made_is_refused_before_ranks_start(tmp_path, kind, directory, why):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    overrides = [f"data={kind}", "data.seq_length=128", f"data.path_to_cache={directory}"]
    (problem,) = refused(*overrides)
    assert problem.startswith(f"data.path_to_cache = {directory} cannot be made ({why}); give")
    assert refused(*overrides[:2], "data.path_to_cache=new/folder") == []


def test_a_cache_below_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    # tests may run as root
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    (problem,) = refused("data.path_to_cache=new")
    assert problem.startswith(
        f"data.path_to_cache = new cannot be made ({tmp_path} cannot be written)"
    )
    (tmp_path / "new").mkdir()  # which may be a complete cache
    assert refused("data.path_to_cache=new") == []


@pytest.mark.parametrize("directory", ["file/x", "/proc/x", "long" * 75, "file/x/y"])
def test_a_run_directory_that_cannot_be_made_is_refused_by_name(tmp_path, capsys, directory):
    (tmp_path / "file").write_text("")
    assert main([f"run_dir={directory}"]) == REFUSED
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
    assert line.startswith(f"  - run_dir = {directory} cannot be made or written (")
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_without_room_for_a_checkpoint_is_said_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=12_345_678)
    )
    (problem,) = refused(f"run_dir={tmp_path}/run")
    assert "takes 182,578,176 bytes and a margin of 1,048,576, but 12,345,678 are free" in problem
    assert "checkpoint=none" in problem
    assert refused(f"run_dir={tmp_path}/run", "checkpoint=none") == []


def test_weights_that_are_not_there_are_said_before_anything_starts(tmp_path):
    (problem,) = refused(f"checkpoint.load_weights={tmp_path}/nothing")
    assert problem == f"checkpoint.load_weights = {tmp_path}/nothing is not a directory"
    (problem,) = refused(f"checkpoint.load_weights={tmp_path}")
    what = "is not a checkpoint (iter_NNNNNNN, release) or a directory of some"
    assert problem == f"checkpoint.load_weights = {tmp_path} {what}"
    (tmp_path / "iter_0000001").mkdir()
    assert refused(f"checkpoint.load_weights={tmp_path}") == []


def test_the_jobs_of_a_sweep_need_a_directory_each_and_are_all_checked_before_the_first(
    tmp_path, capsys
):
    assert main(["seed=1", "--multirun", "trainer.max_steps=5,6,7"]) == REFUSED
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
    assert line.startswith(
        "  - run_dir = runs/laptop is used by the jobs 1, 2, 3 of the sweep; type run_dir='runs/"
    )
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "status.json").write_text("")
    advised = line.split("type run_dir='runs/${name}-")[1].split("'")[0]
    overrides = ["--multirun", "trainer.max_steps=5,6", "checkpoint.resume=never"]
    assert main([*overrides, f"run_dir='{advised}'"]) == REFUSED
    assert "run_dir = 1 holds a run already" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["1"]  # no job has started, and Hydra wrote nothing


def test_ranks_that_somebody_has_started_are_for_one_job(tmp_path, capsys, monkeypatch):
    """In a second job they would use the first one's rendezvous, and wait forever."""
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }.items():
        monkeypatch.setenv(name, str(value))
    overrides = ["--multirun", "seed=1,2", "run_dir='${seed}'"]
    assert main(overrides) == REFUSED
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
    assert line.startswith(
        "  - these are 2 jobs, but torchrun and srun start ranks for one run; type python train.py"
    )
    assert os.listdir(tmp_path) == []
    assert main([*overrides, "trainer.mode=plan"]) == 0


def test_only_the_first_rank_looks_for_an_older_run(tmp_path):
    (tmp_path / "status.json").write_text("")
    run_overrides = [f"run_dir={tmp_path}", "checkpoint.resume=never"]
    assert len(refused(*run_overrides, identity=rank(0, 2))) == 1
    assert (
        refused(*run_overrides, identity=rank(1, 2)) == []
    )  # the first rank may have begun to write


def test_several_nodes_outside_slurm_are_refused_with_the_line_to_type_on_each():
    overrides = [RECIPE, "trainer.num_nodes=2", "data.split='90,5,5'", "name='two words'"]
    overrides.append("model.extra={no_rope_freq: 1}")
    (problem,) = [line for line in refused(*overrides) if line.startswith("trainer.num_nodes")]
    message, _, typed = problem.partition("type: ")
    assert "trainer.num_nodes = 2" in message
    words = shlex.split(typed)  # as a shell reads it
    assert words[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8"]
    assert words[words.index("train.py") + 1 :] == overrides


def test_several_nodes_whose_ranks_a_launcher_started_are_accepted():
    overrides = ["trainer.num_nodes=2", "parallel.expert_model_parallel_size=4"]
    assert refused(*overrides, identity=rank(0, 4)) == []


def test_ranks_that_were_started_must_be_those_of_the_plan():
    (problem,) = refused(identity=rank(0, 3))
    assert problem.startswith(
        "3 ranks were started, but trainer.devices * trainer.num_nodes = 2; start 2"
    )


def test_indexed_data_without_its_files_is_refused_file_by_file(tmp_path):
    prefix = tmp_path / "corpus"
    tokenizer = tmp_path / "tokens"
    problems = refused(*INDEXED, f"data.data_path=[{prefix}]", f"data.tokenizer={tokenizer}")
    assert len(problems) == 2
    assert f"{prefix}.bin" in problems[0] and f"{prefix}.idx" in problems[0]
    assert str(tokenizer) in problems[1]


def test_every_entry_of_an_index_is_looked_at_before_ranks_are_started(tmp_path):
    prefix = tmp_path / "corpus"
    overrides = ["data.split='1,0,0'", "trainer.limit_val_batches=0"]
    entries = [
        struct.pack("<3i", 2, -2, 2),
        struct.pack("<3q", 0, 4, 4),
        struct.pack("<4q", 0, 1, 2, 3),
    ]
    prefix.with_suffix(".idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 3, 4) + b"".join(entries))
    prefix.with_suffix(".bin").write_bytes(bytes(8))
    overrides = [
        *INDEXED,
        *overrides,
        f"data.data_path=[{prefix}]",
        f"data.tokenizer={tmp_path}/tokens",
    ]
    assert [problem.split(";")[0] for problem in refused(*overrides)][0] == (
        f"{prefix}.idx: sequence 1 of document 1 has -2 tokens (byte {HEADER.size + 4})"
    )
    # only rank 0 checks
    assert not any("sequence 1" in problem for problem in refused(*overrides, identity=rank(1, 2)))


def test_all_that_a_machine_lacks_is_reported_together(tmp_path):
    (tmp_path / "status.json").write_text("")
    run_overrides = [f"run_dir={tmp_path}", "checkpoint.resume=never"]
    problems = refused(
        RECIPE, "trainer.num_nodes=2", "data.path_to_cache=status.json", *run_overrides
    )
    starts = ["trainer.accelerator", "data.path_to_cache", "run_dir", "trainer.num_nodes"]
    assert [problem.split(" ")[0] for problem in problems] == starts


def test_nothing_of_this_machine_is_asked_in_plan_mode(tmp_path, capsys):
    (tmp_path / "status.json").write_text("")
    lacking = [RECIPE, "trainer.num_nodes=2", f"run_dir={tmp_path}"]
    lacking += ["model.transformer_impl=transformer_engine", "data=indexed"]
    lacking += [f"data.data_path=[{tmp_path}/corpus]", f"data.tokenizer={tmp_path}/tokens"]
    assert main(lacking) == REFUSED
    assert "problems:" in capsys.readouterr().err
    before = sorted(tmp_path.rglob("*"))
    assert main([*lacking, "trainer.mode=plan"]) == FINISHED
    assert capsys.readouterr().err == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("started", [{"SLURM_PROCID": 0}, {"RANK": 0, "WORLD_SIZE": 3}])
def test_a_plan_is_of_any_machine_whatever_was_started_on_this_one(monkeypatch, capsys, started):
    """`srun --pty bash` is one task; a plan of two ranks can be shown in it."""
    set_all(monkeypatch, started)
    assert main(["trainer.mode=plan"]) == FINISHED
    assert "2 on 1 node of 2" in capsys.readouterr().out


def test_of_several_started_ranks_the_first_prints_the_plan(monkeypatch, capsys):
    set_all(monkeypatch, {"SLURM_PROCID": 1, "SLURM_NTASKS": 2})
    assert main(["trainer.mode=plan"]) == FINISHED
    assert capsys.readouterr().out == ""


def test_ranks_that_were_started_are_planned_for_where_devices_is_null(
    monkeypatch, capsys, tmp_path
):
    set_all(monkeypatch, {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4})
    assert main([]) == REFUSED
    shown = capsys.readouterr()
    assert "4 on 1 node of 4" in shown.out
    assert "RANK = 0, but no MASTER_ADDR and no MASTER_PORT for the ranks to meet at" in shown.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "variables, named",
    [
        ({"RANK": "x"}, ["RANK=x"]),
        ({"RANK": "", "WORLD_SIZE": "-1"}, ["RANK=", "WORLD_SIZE=-1"]),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "many", "SLURM_JOB_ID": "x"},
            ["SLURM_NTASKS=many", "SLURM_JOB_ID=x"],
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK = 2, but WORLD_SIZE = 2"]),
        ({"SLURM_PROCID": "1"}, ["SLURM_PROCID = 1, but SLURM_NTASKS = 1"]),
    ],
)
def test_an_environment_that_cannot_be_a_ranks_is_refused_by_variable(
    monkeypatch, capsys, tmp_path, variables, named
):
    set_all(monkeypatch, variables)
    assert main([]) == REFUSED
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
    assert len(lines) == len(named)
    assert all(
        f"the environment has {text}" in line for text, line in zip(named, lines, strict=True)
    )
    assert os.listdir(tmp_path) == []


def set_all(monkeypatch, variables: dict[str, object]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("local_rank, heard", [(0, True), (1, False)])
def test_one_rank_of_every_node_says_what_is_wrong(monkeypatch, capsys, local_rank, heard):
    started = {
        "RANK": 8 + local_rank,
        "WORLD_SIZE": 16,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": 8,
    }
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    assert main([RECIPE]) == REFUSED
    shown = capsys.readouterr()
    assert ("0 GPUs" in shown.err) == heard
    assert shown.out == ""  # only the first rank prints the plan


# Who this process is


def test_a_process_that_nobody_started_as_a_rank_has_no_identity():
    assert read_identity() is None


def test_torchrun_tells_a_process_its_rank(monkeypatch):
    for name, value in {
        "RANK": 11,
        "WORLD_SIZE": 16,
        "LOCAL_RANK": 3,
        "LOCAL_WORLD_SIZE": 8,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert read_identity() == Identity(11, 16, 3, 8, "env://")
    assert not read_identity().is_ours


@pytest.mark.parametrize(
    "name, rendezvous", [("RANK", "env://"), ("SLURM_PROCID", "tcp://127.0.0.1:20000")]
)
def test_a_rank_that_is_told_nothing_else_is_alone(monkeypatch, name, rendezvous):
    monkeypatch.setenv(name, "0")
    assert read_identity() == Identity(0, 1, 0, 1, rendezvous)


def test_the_projects_own_launcher_is_known_by_its_rendezvous(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MIXTRAIN_FOLDER", "/somewhere")
    assert read_identity().is_ours
    assert read_identity().rendezvous == "file:///somewhere/rendezvous"


SLURM = {
    "SLURM_PROCID": 11,
    "SLURM_NTASKS": 16,
    "SLURM_LOCALID": 3,
    "SLURM_NNODES": 2,
    "SLURM_JOB_ID": 4_000_123,
}


@pytest.mark.parametrize(
    "more, rendezvous",
    [
        ({"SLURM_JOB_NODELIST": "node7"}, "tcp://node7:20123"),
        ({"SLURM_JOB_NODELIST": "node[07-08]"}, "tcp://node07:20123"),
        (
            {"SLURM_JOB_NODELIST": "rack[1-2]node[003,005-006]-ib,login[1-2]"},
            "tcp://rack1node003-ib:20123",
        ),
        ({"SLURM_JOB_NODELIST": "a,b"}, "tcp://a:20123"),
        (
            {"SLURM_JOB_NODELIST": "node[07-08]", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"},
            "tcp://10.0.0.1:4000",
        ),
    ],
)
def test_slurm_tells_a_process_its_rank_and_the_first_node(monkeypatch, more, rendezvous):
    for name, value in {**SLURM, **more}.items():
        monkeypatch.setenv(name, str(value))
    assert read_identity() == Identity(11, 16, 3, 8, rendezvous)
