"""Conversion of whole directories: nothing is lost either way, every layout reads it, and bad input
writes nothing.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import torch
from checkpoints import tensors_of
from composing import ROOT, config_of, plan_of, tree_of
from megatron.core import dist_checkpointing
from rank_workers import run_ranks
from safetensors.torch import load_file, save_file

from mixtrain.checkpoint import directory, integrity, load, safe, same_model
from mixtrain.checkpoint.save import Saver
from mixtrain.checkpoint.state import RunState
from mixtrain.config.compose import CONF
from mixtrain.config.plan import resolve
from mixtrain.config.typed_config import from_hydra
from mixtrain.engine import model, optimizer, process_groups, shards
from mixtrain.errors import UserError
from mixtrain.interop.convert import (
    checkpoint_config,
    dtype_cast,
    flat_ranges,
    hf_config,
    hf_files,
    to_hf,
    to_megatron,
    weights,
)


@pytest.mark.parametrize(
    "kind, layout",
    [(kind, "hub") for kind in hf_models.MODELS]
    + [(kind, "fused") for kind in ("olmoe", "qwen2_moe", "qwen3_moe")],
)
def test_there_and_back_every_bit_is_where_it_was(kind, layout, tmp_path):
    there = hf_models.saved(kind, tmp_path / "there", fused=layout == "fused", shard="300KB")
    to_megatron.convert(there, tmp_path / "megatron")
    to_hf.convert(tmp_path / "megatron", tmp_path / "back", layout=layout, max_shard_size=200_000)
    assert hf_models.unequal(there, tmp_path / "back") == []
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    model_class = hf_models.MODELS[kind][0]
    before, after = (
        model_class.from_pretrained(path).config.to_dict() for path in (there, tmp_path / "back")
    )
    training = {
        "initializer_range",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "attention_dropout",
        "use_cache",
    }
    ids = {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path"}  # no tokenizer, no ids
    assert {name for name in before if before[name] != after[name]} <= training | ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype, tmp_path):
    there = hf_models.saved("mixtral", tmp_path / "there", dtype=dtype)
    to_megatron.convert(there, tmp_path / "megatron")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "megatron" / "release").values()} == {
        dtype
    }
    to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert hf_models.unequal(there, tmp_path / "back") == []
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(
        dtype
    ).removeprefix("torch.")


def test_both_layouts_and_any_sharding_give_one_checkpoint_byte_for_byte(hub, converted, tmp_path):
    fused = hf_models.saved("mixtral", tmp_path / "fused", fused=True)
    to_megatron.convert(fused, tmp_path / "megatron")
    names = sorted(path.name for path in (converted / "release").iterdir())
    same, _, _ = filecmp.cmpfiles(
        converted / "release", tmp_path / "megatron" / "release", names, shallow=False
    )
    assert sorted(same) == names and len(names) > 6


def test_several_processes_write_the_same_tensors(hub, converted, tmp_path):
    to_megatron.convert(hub, tmp_path / "megatron", processes=3)
    here, there = (tensors_of(path / "release") for path in (converted, tmp_path / "megatron"))
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    assert integrity.problem(tmp_path / "megatron" / "release", full=True) == ""
    to_hf.convert(tmp_path / "megatron", tmp_path / "back", max_shard_size=200_000, processes=3)
    assert hf_models.unequal(hub, tmp_path / "back") == []


def test_pytorchs_own_loader_reads_what_the_table_says(hub, converted):
    config = checkpoint_config.config_of(converted / "release")
    expected = weights.to_megatron(config, hf_models.tensors_of(hub))
    found = tensors_of(converted / "release")
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_large_tensors_come_in_blocks_and_small_blocks_change_nothing(
    hub, converted, tmp_path, monkeypatch
):
    monkeypatch.setattr(to_megatron, "BLOCK", 4096)
    monkeypatch.setattr(to_hf, "BLOCK", 1000)
    to_megatron.convert(hub, tmp_path / "megatron")
    here, there = (tensors_of(path / "release") for path in (converted, tmp_path / "megatron"))
    assert all(torch.equal(here[key], there[key]) for key in here)
    for layout in ("hub", "fused"):
        to_hf.convert(tmp_path / "megatron", tmp_path / layout, layout=layout)
    assert hf_models.unequal(hub, tmp_path / "hub") == []
    assert (
        hf_models.unequal(
            hf_models.saved("mixtral", tmp_path / "f", fused=True), tmp_path / "fused"
        )
        == []
    )


def test_config_json_of_transformers_4_says_the_same(hub, converted, tmp_path):
    old = hf_models.copied(hub, tmp_path / "old")
    values = json.loads((old / "config.json").read_text())
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values["torch_dtype"] = values.pop("dtype")
    (old / "config.json").write_text(json.dumps(values))
    to_megatron.convert(old, tmp_path / "megatron")
    assert checkpoint_config.config_of(
        tmp_path / "megatron" / "release"
    ) == checkpoint_config.config_of(converted / "release")


LAYOUTS = {
    "EP2": ["parallel.expert_model_parallel_size=2"],
    "TP2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "PP2": [
        "parallel.pipeline_model_parallel_size=2",
        "model.num_layers=3",
        "parallel.num_layers_in_first_pipeline_stage=2",
    ],
}


def words_of(converted: Path) -> list[str]:
    """The words that make the converted model."""
    config = checkpoint_config.config_of(converted / "release")
    keys = [
        key
        for key in hf_config.from_hugging_face(hf_config.to_hugging_face(config))
        if key.startswith("model.")
    ]
    shown = [f"{key}={hf_config.show(hf_config.value_of(config, key))}" for key in keys]
    return [
        "data=mock",
        "data.seq_length=32",
        "trainer.global_batch_size=8",
        "trainer.timeout_minutes=1",
        *shown,
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_one_checkpoint_and_what_it_saves_comes_back(
    layout, hub, converted, tmp_path
):
    words = [
        *words_of(converted),
        f"checkpoint.load_weights={converted}",
        f"run_dir={tmp_path / 'run'}",
    ]
    plan = plan_of(*words, "trainer.devices=2", "parallel=ep1", *LAYOUTS[layout])
    (tmp_path / "run").mkdir()

    def load_and_save(identity) -> None:
        with process_groups.start(plan, identity) as here:
            training = optimizer.build(plan, model.build(plan, here.device))
            load.load_weights(plan, here, training, load.find_weights(plan, here), print)
            values = checkpoint_config.untrained_state(plan.config).config
            Saver(plan, here, training, print).save(RunState(step=7, config=values))

    run_ranks(2, load_and_save, tmp_path / "ranks")
    to_hf.convert(tmp_path / "run", tmp_path / "back")
    assert hf_models.unequal(hub, tmp_path / "back") == []
    own = {
        name
        for name in objects_of(directory.newest(tmp_path / "run"))
        if not name.startswith("rng_state")
    }
    # Transformer Engine's, for Megatron-LM
    assert objects_of(converted / "release") == own and len(own) > 30


def test_weights_without_biases_are_taken_by_a_router_with_them_which_start_at_zero(
    converted, tmp_path
):
    words = [*words_of(converted), f"checkpoint.load_weights={converted}", "router=expert_bias"]
    (problem,) = same_model.problems(config_of(*words), converted / "release")
    # and nothing else
    assert problem.startswith("router.moe_router_score_function = sigmoid, but the weights of")
    plan = plan_of(
        *words,
        "checkpoint.acknowledge_differences=[router.moe_router_score_function]",
        "trainer.devices=2",
        "parallel=ep1",
        *LAYOUTS["EP2"],
    )

    def load_weights(identity) -> tuple[list[str], list[float], bool]:
        said: list[str] = []
        with process_groups.start(plan, identity) as here:
            training = optimizer.build(plan, model.build(plan, here.device, drawn=False))
            load.load_weights(plan, here, training, converted / "release", said.append)
            routers = {
                name: part
                for name, part in training.chunks[0].state_dict().items()
                if ".router." in name
            }
        biases = [part for name, part in routers.items() if name.endswith("expert_bias")]
        weights = torch.stack([part for name, part in routers.items() if name.endswith("weight")])
        stored = tensors_of(converted / "release")["decoder.layers.mlp.router.weight"]
        return (
            said,
            [bias.abs().max().item() for bias in biases],
            torch.equal(weights.cpu(), stored),
        )

    for said, biases, same in run_ranks(2, load_weights, tmp_path / "ranks"):
        assert said == ["the routers' biases start at zero: these weights have none"]
        assert biases == [0.0] * plan.config.model.num_layers and same


def objects_of(checkpoint: Path) -> set[str]:
    return {
        name
        for name, kind in safe.read_metadata(checkpoint).state_dict_metadata.items()
        if not hasattr(kind, "size")
    }


def test_megatron_cores_own_loader_takes_it(converted, tmp_path):
    """As Megatron-LM does after reading `release` in the tracker."""
    assert (converted / directory.TRACKER).read_text().strip() == "release"
    plan = plan_of(*words_of(converted), "trainer.devices=2", "parallel=ep1", *LAYOUTS["EP2"])
    release = str(converted / "release")
    wholes = tensors_of(converted / "release")

    def load_with_upstream(identity) -> list[str]:
        with process_groups.start(plan, identity) as here:
            (chunk,) = model.build(plan, here.device)
            common = dist_checkpointing.load_common_state_dict(release)
            assert (
                common["iteration"] == 0
                and common["args"].num_experts == 4
                and common["checkpoint_version"] == 3.0
            )
            loaded = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, release)
            chunk.load_state_dict(loaded["model"], strict=True)
            return [
                shard.key
                for shard in shards.shards(chunk)
                if not torch.equal(shard.data, shard.of(wholes[shard.key]))
            ]

    assert run_ranks(2, load_with_upstream, tmp_path / "ranks") == [[], []]


def test_weights_of_a_bf16_run_come_out_in_bf16_or_as_asked(tmp_path):
    config = [
        "trainer.precision=bf16",
        "model.num_layers=1",
        "model.vocab_size=128",
        "data=mock",
        "parallel=ep1",
        "data.seq_length=32",
    ]
    plan = plan_of(*config, f"run_dir={tmp_path / 'run'}", "trainer.timeout_minutes=1")
    (tmp_path / "run").mkdir()

    def save(identity) -> None:
        with process_groups.start(plan, identity) as here:
            training = optimizer.build(plan, model.build(plan, here.device))
            places_of = shards.read(plan, training.chunks)
            torch.save(places_of, tmp_path / "wholes.pt")
            Saver(plan, here, training, print).save(
                RunState(step=1, config=checkpoint_config.untrained_state(plan.config).config)
            )

    run_ranks(1, save, tmp_path / "ranks")
    expected = weights.to_hugging_face(
        plan.config, torch.load(tmp_path / "wholes.pt", weights_only=True)
    )
    for dtype in (None, torch.float32):
        to_hf.convert(tmp_path / "run", tmp_path / str(dtype), dtype=dtype)
        found = load_file(tmp_path / str(dtype) / "model.safetensors")
        wanted = dtype or torch.bfloat16
        assert {tensor.dtype for tensor in found.values()} == {wanted}
        assert all(torch.equal(found[name], expected[name].to(wanted)) for name in expected)


# --- what is left of a killed conversion


def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_a_rerun_works(
    hub, tmp_path, monkeypatch
):
    for convert, source, out in (
        (to_megatron.convert, hub, tmp_path / "megatron"),
        (to_hf.convert, tmp_path / "megatron", tmp_path / "back"),
    ):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # a forked process has no others
            monkeypatch.setattr(
                dtype_cast.DtypeCast, "__call__", dies_after(dtype_cast.DtypeCast.__call__, 20)
            )
            convert(source, out)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        writing = out.with_name(out.name + ".writing")
        assert writing.is_dir() and not out.exists()
        assert (
            not (writing / "release" / integrity.MANIFEST).exists()
            and not (writing / "config.json").exists()
        )
        if convert is to_megatron.convert:
            with pytest.raises(UserError):
                checkpoint_config.checkpoint_at(writing)
        convert(source, out)
        assert not writing.exists()
    assert hf_models.unequal(hub, tmp_path / "back") == []


def dies_after(function, calls: int):
    left = [calls]

    def call(*arguments):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return call


# --- what goes with the tensors


def test_tokenizer_files_travel_both_ways_and_code_does_not(hub, tmp_path):
    there = hf_models.copied(hub, tmp_path / "there")
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"},
    }
    (there / "tokenizer.json").write_text(json.dumps(tokenizer))
    (there / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    (there / "chat_template.jinja").write_text("{{ messages }}")
    (there / "modeling_evil.py").write_text("raise SystemExit")
    to_megatron.convert(there, tmp_path / "megatron")
    to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "back" / name).read_bytes() == (there / name).read_bytes()
    assert not (tmp_path / "back" / "modeling_evil.py").exists()
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    ids = [values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    assert ids == [1, 2, None]  # as config.json came


def tool(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "tokenizer.json"])
def test_a_model_without_a_tokenizer_json_is_said_with_what_makes_one(name, hub, tmp_path):
    """No data.tokenizer= is advised that the next tool would refuse."""
    there = hf_models.copied(hub, tmp_path / "there")
    out = tmp_path / "megatron"
    (there / name).write_text('{"model": {"vocab": {"a": 0}}}')
    done = tool("convert_hf_to_megatron", there, out)
    assert done.returncode == 0, done.stderr
    if name == "tokenizer.json":
        assert done.stdout.endswith(
            f"checkpoint.load_weights={out} data.tokenizer={out / 'tokenizer'}\n"
        )
        return
    assert "data.tokenizer" not in done.stdout
    assert f"type: python tools/convert_tokenizer.py {there / name} OUT_DIR" in done.stdout


@pytest.mark.long
def test_the_tools_convert_and_say_what_to_type_next(hub, tmp_path):
    there = tool("convert_hf_to_megatron", hub, tmp_path / "megatron", "--dtype", "bf16")
    assert there.returncode == 0 and "GB" not in there.stderr, there.stderr
    assert f"train from it with checkpoint.load_weights={tmp_path / 'megatron'}" in there.stdout
    back = tool(
        "convert_megatron_to_hf",
        tmp_path / "megatron",
        tmp_path / "back",
        "--max-shard-size",
        "0.1MB",
    )
    assert back.returncode == 0, back.stderr
    assert {tensor.dtype for tensor in hf_models.tensors_of(tmp_path / "back").values()} == {
        torch.bfloat16
    }
    again = tool("convert_megatron_to_hf", tmp_path / "megatron", tmp_path / "back")
    assert again.returncode == 2
    said = (
        f"mixtrain: 1 problem:\n  - {tmp_path / 'back'} is there already: give a new directory,"
        " or remove it\n"
    )
    assert again.stderr.endswith(said) and "Traceback" not in again.stderr
    size = tool(
        "convert_megatron_to_hf", tmp_path / "megatron", tmp_path / "x", "--max-shard-size", "5XB"
    )
    assert size.returncode == 2 and "5XB is not a size; type 5GB, 500MB or 2GiB" in size.stderr


def test_the_facts_of_config_json_become_an_option_of_the_model_group(hub, tmp_path):
    values = hf_config.from_hugging_face(hf_files.read_config(hub))
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "model" / "mine.yaml").write_text(checkpoint_config.model_yaml(values, "a test"))
    config = resolve(from_hydra(tree_of("model=mine", conf=conf)))
    assert {key: hf_config.value_of(config, key) for key in values} == values
    published = hf_config.from_hugging_face(
        hf_config.to_hugging_face(resolve(config_of("model=mixtral_8x7b")))
    )
    assert "hf_model: mistralai/Mixtral-8x7B-v0.1" in checkpoint_config.model_yaml(
        published, "a test"
    )


def peak_gb(folder: Path, out: Path) -> float:
    """The peak resident memory of a conversion there and back, in a process of its own, as the
    system counts it.
    """
    program = (  # both ways in one process, which imports for seconds
        "import re, sys; from pathlib import Path\n"
        "from mixtrain.interop.convert import to_hf, to_megatron\n"
        "there, out = map(Path, sys.argv[1:])\n"
        "to_megatron.convert(there, out / 'megatron')\n"
        "to_hf.convert(out / 'megatron', out / 'back')\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1e6)"
    )
    out.mkdir()
    command = [sys.executable, "-c", program, str(folder), str(out)]
    return float(
        subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
        ).stdout
    )


@pytest.mark.long
def test_memory_does_not_grow_with_the_model(hub, tmp_path):
    """A model of 0.9 GB takes no more than a few blocks above one of 1 MB."""
    config = json.loads((hub / "config.json").read_text())
    values = config | {
        "hidden_size": 512,
        "intermediate_size": 8192,
        "num_local_experts": 8,
        "num_hidden_layers": 4,
    }
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(values))
    found = hf_config.from_hugging_face(values)
    names = flat_ranges.build_index(checkpoint_config.configuration(found), "hub").hf_shapes
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in names.items()},
        large / "model.safetensors",
    )
    assert (large / "model.safetensors").stat().st_size > 0.8e9
    small = peak_gb(hub, tmp_path / "a")
    assert peak_gb(large, tmp_path / "b") < min(1.5, small + 0.5)


def test_the_checkpoint_is_listed_and_read_where_training_looks_for_weights(converted):
    assert directory.newest(converted) == converted / "release"
    listed = tool("checkpoint", "list", converted)
    assert listed.returncode == 0 and "valid" in listed.stdout
