"""The proof of a conversion holds for what is converted, and for nothing that is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import torch
from composing import ROOT
from rank_workers import run_ranks
from safetensors.torch import load_file, save_file

from mixtrain.checkpoint.tensor_reader import TensorReader
from mixtrain.config.plan import derive
from mixtrain.engine import process_groups
from mixtrain.errors import UserError
from mixtrain.interop.convert import (
    checkpoint_config,
    layer_comparison,
    reference_models,
    to_hf,
    to_megatron,
)

sys.path.insert(0, str(ROOT / "tools"))
import verify_conversion  # noqa: E402

MODELS = ["mixtral", "qwen3_moe, not normalised", "qwen2_moe", "olmoe"]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """(a model of Hugging Face, its checkpoint)."""
    folder = tmp_path_factory.mktemp("pair")
    there = hf_models.saved(request.param, folder / "there", shard="300KB")
    to_megatron.convert(there, folder / "megatron")
    return there, folder / "megatron" / "release"


def found_by(
    there: Path, checkpoint: Path, folder: Path, damages=("",), precision="fp32"
) -> list[dict]:
    """What the proof finds with each of the damages, in one rank."""

    def find(identity) -> list[dict]:
        config = checkpoint_config.config_of(checkpoint)
        parts = TensorReader(checkpoint)
        own = checkpoint_config.for_one_rank(config, precision)
        tokens = layer_comparison.random_tokens(config.model.vocab_size, 2, 48)
        with process_groups.start(derive(own), identity) as here:
            theirs = reference_models.HuggingFaceLayers(
                there, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            )
            found = []
            for name in damages:
                ours = (
                    layer_comparison.damaged_megatron(name, own, parts, here)
                    if name
                    else reference_models.MegatronLayers(own, parts, here)
                )
                *_, verdict = layer_comparison.compare(
                    theirs, ours, config.model.num_layers, tokens
                )
                rows = [(row.relative, row.rerouted) for row in verdict.layers]
                found.append(
                    {
                        "problems": verdict.problems,
                        "layers": rows,
                        "logits": verdict.logits_relative,
                        "cosine": verdict.logits_cosine,
                        "kl": verdict.divergence,
                    }
                )
        return found

    (found,) = run_ranks(1, find, folder)
    return found


def test_the_converted_model_is_the_same_and_every_damage_is_caught(pair, tmp_path):
    same, *damaged = found_by(*pair, tmp_path, ("", *layer_comparison.DAMAGES))
    assert same["problems"] == []
    assert all(relative < 1e-5 and others == 0 for relative, others in same["layers"])
    assert same["logits"] < 1e-5 and same["kl"] < 1e-9
    assert {
        name: len(found["problems"]) > 0
        for name, found in zip(layer_comparison.DAMAGES, damaged, strict=True)
    } == dict.fromkeys(layer_comparison.DAMAGES, True)
    for name, found in zip(layer_comparison.DAMAGES, damaged, strict=True):
        assert found["layers"][0][0] > 1e-2, name  # in the first layer, by far
        assert found["kl"] > 1e-4, name


def test_a_damaged_checkpoint_proves_nothing_although_the_model_made_of_it_has_the_same_damage(
    tmp_path,
):
    there = hf_models.saved("mixtral", tmp_path / "there")
    to_megatron.convert(there, tmp_path / "megatron")
    shard = max(
        (tmp_path / "megatron" / "release").glob("*.distcp"), key=lambda path: path.stat().st_size
    )
    data = bytearray(shard.read_bytes())
    data[len(data) // 8 * 4] ^= 1
    shard.write_bytes(data)
    to_hf.convert(tmp_path / "megatron", tmp_path / "back", verify=False)
    assert len(hf_models.unequal(there, tmp_path / "back")) == 1
    with pytest.raises(
        UserError, match=f"{shard} is damaged: its SHA-256 is not that of what was written"
    ):
        verify_conversion.main([str(tmp_path / "back"), str(tmp_path / "megatron")])


def test_in_bf16_the_cosine_decides(pair, tmp_path):
    (found,) = found_by(*pair, tmp_path, precision="bf16")
    assert found["problems"] == [] and layer_comparison.MIN_COSINE < found["cosine"] < 1 - 1e-9


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "verify_conversion.py"), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.long
def test_the_tool_proves_writes_a_manifest_and_tests_itself(tmp_path):
    there = hf_models.saved("mixtral", tmp_path / "there", dtype=torch.bfloat16)
    to_megatron.convert(there, tmp_path / "megatron")
    manifest = tmp_path / "manifest.jsonl"
    done = tool(there, tmp_path / "megatron", "--manifest", manifest, "--length", "32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the same model"
    entries = {entry["name"]: entry for entry in map(json.loads, manifest.read_text().splitlines())}
    tensors = load_file(there / "model.safetensors")
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert (
            entry["sha256"]
            == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        )
        assert (entry["shape"], entry["dtype"], entry["equal"]) == (
            list(tensor.shape),
            "bfloat16",
            True,
        )
        assert entry["megatron"]["sha256_of_part"] == entry["sha256"]
    tested = tool(there, tmp_path / "megatron", "--self-test", "--length", "32")
    assert tested.returncode == 0 and tested.stdout.splitlines()[-1] == "6 of 6 caught"


def test_a_wrong_number_on_the_disk_is_exit_code_1_and_other_shapes_are_2(tmp_path):
    there = hf_models.saved("mixtral", tmp_path / "there")
    to_megatron.convert(there, tmp_path / "megatron")
    file = there / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"][3] *= 1.5
    save_file(tensors, file, {"format": "pt"})
    found = tool(there, tmp_path / "megatron", "--manifest", tmp_path / "m", "--length", "32")
    assert found.returncode == 1
    assert "not the same: after layer 1 the hidden states are" in found.stdout
    assert "after layer 0" not in found.stdout
    unequal = [
        entry["name"]
        for entry in map(json.loads, (tmp_path / "m").read_text().splitlines())
        if not entry["equal"]
    ]
    assert unequal == ["model.layers.1.self_attn.o_proj.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:128].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight has shape \(128, 64\)"):
        verify_conversion.main([str(there), str(tmp_path / "megatron")])
