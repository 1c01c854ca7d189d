"""What cannot be converted is refused by the name of the file, tensor or key, and nothing is
written then.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import hf_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtrain.checkpoint import integrity, state
from mixtrain.errors import UserError
from mixtrain.interop.convert import hf_files, output_directory, to_hf, to_megatron
from mixtrain.interop.convert.dtype_cast import DTYPES

GATE = "model.layers.1.block_sparse_moe.gate.weight"


def damaged_header(path: Path, change) -> None:
    """Change a safetensors file's header, its data left as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def change_index(folder: Path, change) -> None:
    path = folder / hf_files.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensor(folder: Path, name: str, change) -> None:
    file = folder / json.loads((folder / hf_files.INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)


def only_a_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
REFUSALS = {
    "00002-of-": lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
    "leads out of its directory, to ../secret.safetensors": lambda folder: change_index(
        folder, lambda names: names.__setitem__(GATE, "../secret.safetensors")
    ),
    "leads out of its directory, to /etc/passwd": lambda folder: change_index(
        folder, lambda names: names.__setitem__(GATE, "/etc/passwd")
    ),
    "which is not a safetensors file": lambda folder: change_index(
        folder, lambda names: names.__setitem__(GATE, "x.bin")
    ),
    "pytorch_model.bin is a pickle": only_a_pickle,
    f"{GATE} has shape (2, 64)": lambda folder: change_tensor(
        folder, GATE, lambda tensor: tensor[:2]
    ),
    f"{GATE} is torch.bfloat16": lambda folder: change_tensor(
        folder, GATE, lambda tensor: tensor.bfloat16()
    ),
    "is I64; weights are F32, F16, BF16": lambda folder: change_tensor(
        folder, GATE, lambda tensor: tensor.long()
    ),
    "is damaged": lambda folder: os.truncate(first_file(folder), 2000),
    "config.json is damaged: not valid JSON (": lambda folder: (folder / "config.json").write_text(
        "{"
    ),
    "config.json is damaged: nested more than 64 deep": lambda folder: (
        folder / "config.json"
    ).write_text(DEEP),
    "index.json is damaged: nested more than 64 deep": lambda folder: (
        folder / hf_files.INDEX
    ).write_text(DEEP),
    "index.json is damaged: weight_map = 5 is not an object": lambda folder: (
        folder / hf_files.INDEX
    ).write_text('{"weight_map": 5}'),
    'index.json is damaged: the key "a" occurs twice': lambda folder: (
        folder / hf_files.INDEX
    ).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
    'the key "\\u001b[2J" is not text without control characters, in weight_map': lambda folder: (
        change_index(folder, lambda names: names.__setitem__("\x1b[2J", "x.safetensors"))
    ),
    "config.json is damaged: NaN is not a JSON number": lambda folder: change_config(
        folder, rope_theta=math.nan
    ),
    "config.json is damaged: the number 1e999 is too large": lambda folder: (
        folder / "config.json"
    ).write_text('{"rope_theta": 1e999}'),
    "config.json is refused: not a regular file": lambda folder: a_pipe(folder / "config.json"),
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "model_type = llama": lambda folder: change_config(folder, model_type="llama"),
    "auto_map: the model needs its own code": lambda folder: change_config(
        folder, auto_map={"AutoModel": "m.M"}
    ),
    "model.moe_router_topk = 1": lambda folder: change_config(folder, num_experts_per_tok=1),
    "has both": lambda folder: save_file({"a": torch.zeros(1)}, folder / "model.safetensors"),
    f"{GATE}, which model.safetensors.index.json does not list": lambda folder: change_index(
        folder, lambda names: names.pop(GATE)
    ),
    "model.layers.3.input_layernorm.weight is missing": lambda folder: change_config(
        folder, num_hidden_layers=4
    ),
    "is not a tensor of this model": lambda folder: change_config(folder, num_hidden_layers=2),
}


@pytest.mark.parametrize("problem", REFUSALS)
def test_a_wrong_directory_is_refused_by_name_and_nothing_is_written(problem, hub, tmp_path):
    folder = hf_models.copied(hub, tmp_path / "there")
    REFUSALS[problem](folder)
    with pytest.raises(UserError) as refused:
        to_megatron.convert(folder, tmp_path / "out")
    assert any(problem in line for line in refused.value.problems), refused.value.problems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def with_config(converted: Path, target: Path, **keys) -> Path:
    """A copy of a checkpoint whose run had other settings."""
    release = hf_models.copied(converted / "release", target)
    values = json.loads((release / state.NAME).read_text())
    for key, value in keys.items():
        section, name = key.split("__")
        values["config"][section][name] = value
    (release / state.NAME).write_text(json.dumps(values))
    files = integrity.read_manifest(release)
    integrity.write_manifest(release, files | integrity.describe([release / state.NAME]))
    return release


CANNOT = {
    "router.moe_router_load_balancing_type = sinkhorn": {
        "router__moe_router_load_balancing_type": ["sinkhorn"]
    },
    "router.moe_router_score_function = sigmoid": {"router__moe_router_score_function": "sigmoid"},
    "router.moe_router_pre_softmax = true": {"router__moe_router_pre_softmax": True},
    "dispatcher.moe_expert_capacity_factor = 1.25": {
        "dispatcher__moe_expert_capacity_factor": 1.25
    },
    "model.moe_shared_expert_intermediate_size = 8": {
        "model__moe_shared_expert_intermediate_size": 8
    },
}


@pytest.mark.parametrize("problem", CANNOT)
def test_what_hugging_face_cannot_express_is_refused_by_key_and_nothing_is_written(
    problem, converted, tmp_path
):
    release = with_config(converted, tmp_path / "checkpoint", **CANNOT[problem])
    with pytest.raises(UserError) as refused:
        to_hf.convert(release, tmp_path / "out")
    assert refused.value.problems[0].startswith(problem + ": ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_checkpoint_of_other_tensors_than_its_configuration_is_refused(converted, tmp_path):
    release = with_config(converted, tmp_path / "checkpoint", model__vocab_size=512)
    with pytest.raises(
        UserError, match=r"embedding.word_embeddings.weight has shape \(256, 64\); .* \(512, 64\)"
    ):
        to_hf.convert(release, tmp_path / "out")


def test_a_damaged_or_absent_checkpoint_is_refused(converted, tmp_path):
    release = hf_models.copied(converted / "release", tmp_path / "checkpoint")
    data = release / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(UserError, match="__0_0.distcp has .* bytes, not the"):
        to_hf.convert(release, tmp_path / "out")
    with pytest.raises(UserError, match="is not a checkpoint .*, and holds none"):
        to_hf.convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_fp16_does_not_have_are_refused_by_name(hub, converted, tmp_path):
    large = hf_models.copied(hub, tmp_path / "large")
    change_tensor(large, GATE, lambda tensor: tensor.fill_(7e4))
    to_megatron.convert(large, tmp_path / "megatron")
    with pytest.raises(UserError, match=f"{GATE} has 70000, and fp16 ends at 65504"):
        to_hf.convert(tmp_path / "megatron", tmp_path / "out", dtype=DTYPES["fp16"])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.writing").exists()


def test_what_is_there_is_never_overwritten_and_a_full_disk_is_told_before(
    hub, tmp_path, monkeypatch
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="is there already"):
        to_megatron.convert(hub, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    monkeypatch.setattr(output_directory, "MARGIN", 1 << 60)
    with pytest.raises(
        UserError,
        match=r"takes [\d,]+ bytes, and up to 1,152,9[\d,]+ for .*, but [\d,]+ are free on",
    ):
        to_megatron.convert(hub, tmp_path / "other")
    assert not (tmp_path / "other").exists()
