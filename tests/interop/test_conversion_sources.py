"""Directories as people have them: what is taken and said, and what is called by its name and
refused.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import hf_models
import pytest
import torch
from composing import ROOT
from safetensors.torch import load_file, save_file
from test_conversion import tool
from test_conversion_refusals import change_config, change_index, first_file

from mixtrain.errors import UserError
from mixtrain.interop.convert import hf_files, to_hf, to_megatron, unsupported_models

sys.path.insert(0, str(ROOT / "tools"))
import verify_conversion  # noqa: E402

GATE = "model.layers.1.block_sparse_moe.gate.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def there(tmp_path) -> Path:
    """A model in one file, to be changed."""
    return hf_models.saved("mixtral", tmp_path / "there")


@pytest.fixture
def tied(tmp_path) -> Path:
    return hf_models.saved("tied mixtral", tmp_path / "there")


def change(folder: Path, change) -> None:
    """Change the tensors of a model in one file."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})


def taken(folder: Path, out: Path, capfd, **how: object) -> list[str]:
    """What is said on standard error of a conversion."""
    capfd.readouterr()
    to_megatron.convert(folder, out, **how)
    return capfd.readouterr().err.splitlines()


def refused(folder: Path, out: Path, **how: object) -> str:
    with pytest.raises(UserError) as wrong:
        to_megatron.convert(folder, out, **how)
    assert not out.exists() and not out.with_name(out.name + ".writing").exists()
    assert len(wrong.value.problems) == 1
    return wrong.value.problems[0]


def frequencies(theta: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As transformers 4 computes the buffer of a head of 16."""
    return (1.0 / theta ** (torch.arange(0, 16, 2, dtype=torch.int64).float() / 16)).to(dtype)


# --- taken, and said


def test_a_plain_model_is_converted_without_a_word(there, tmp_path, capfd):
    assert taken(there, tmp_path / "out", capfd) == []


def test_an_output_layer_that_is_the_embedding_is_left_out_of_a_tied_model(tied, tmp_path, capfd):
    change(tied, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    (said,) = taken(tied, tmp_path / "out", capfd)
    assert said == f"{HEAD} is left out: it is equal to {EMBEDDING}, and tie_word_embeddings = true"
    to_hf.convert(tmp_path / "out", tmp_path / "back")
    assert (
        hf_models.unequal(hf_models.saved("tied mixtral", tmp_path / "plain"), tmp_path / "back")
        == []
    )


@pytest.mark.parametrize("how", ["another number", "another dtype", "another shape"])
def test_an_output_layer_that_is_not_the_embedding_is_refused_in_a_tied_model(how, tied, tmp_path):
    def other(tensors: dict) -> dict:
        head = tensors[EMBEDDING].clone()
        head[-1, -1] += 1e-6
        return tensors | {
            HEAD: {"another number": head, "another dtype": head.half()}.get(how, head[:9])
        }

    change(tied, other)
    said = refused(tied, tmp_path / "out", dtype=torch.float32)
    assert said.startswith(
        f"{HEAD} and {EMBEDDING} are not equal, but config.json has tie_word_embeddings = true"
    )
    change_config(tied, tie_word_embeddings=False)  # as it says
    if how == "another number":
        to_megatron.convert(tied, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_buffers_of_the_rotary_embedding_are_left_out_where_they_are_what_the_base_makes(
    dtype, there, tmp_path, capfd
):
    names = [
        "model.rotary_emb.inv_freq",
        *(f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(3)),
    ]
    change(there, lambda tensors: tensors | {name: frequencies(1e4, dtype) for name in names})
    (said,) = taken(there, tmp_path / "out", capfd)
    assert (
        "rotary_emb.inv_freq (and 3 like it) is left out: rope_theta = 10000 gives the same" in said
    )
    to_hf.convert(tmp_path / "out", tmp_path / "back")
    assert (
        hf_models.unequal(hf_models.saved("mixtral", tmp_path / "plain"), tmp_path / "back") == []
    )


@pytest.mark.parametrize(
    "buffer", [frequencies(1e6), frequencies(10001.0), frequencies(1e4) / 2, frequencies(1e4)[:4]]
)
def test_buffers_of_another_base_are_refused_with_it(buffer, there, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(there, lambda tensors: tensors | {name: buffer.clone()})
    assert refused(there, tmp_path / "out").startswith(
        f"{name} does not match head_dim = 16 and rope_theta = 10000"
    )


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."]
)
def test_what_a_wrapper_puts_before_all_names_is_taken_off(prefix, there, tmp_path, capfd):
    change(there, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    said = taken(there, tmp_path / "out", capfd)
    assert len(said) == prefix.count(".") - prefix.startswith("base_model")
    assert all(" is removed from the names of all " in line for line in said)
    to_hf.convert(tmp_path / "out", tmp_path / "back")
    assert (
        hf_models.unequal(hf_models.saved("mixtral", tmp_path / "plain"), tmp_path / "back") == []
    )


def test_a_prefix_of_some_names_is_refused(there, tmp_path):
    change(
        there,
        lambda tensors: {
            ("" if name == GATE else "module.") + name: tensors[name] for name in tensors
        },
    )
    with pytest.raises(
        UserError, match="module.model.embed_tokens.weight is not a tensor of this model"
    ):
        to_megatron.convert(there, tmp_path / "out")


def test_the_only_file_may_have_another_name_and_one_of_several_may_not(there, tmp_path, capfd):
    (there / "model.safetensors").rename(there / "weights.safetensors")
    (said,) = taken(there, tmp_path / "out", capfd)
    assert said == "weights.safetensors is used as model.safetensors"
    (there / "weights.safetensors").rename(there / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors, but no model.safetensors.index.json" in refused(
        there, tmp_path / "x"
    )
    save_file({"a": torch.zeros(1)}, there / "more.safetensors")
    assert "has model-00001-of-00002.safetensors, and 1 more, but no model" in refused(
        there, tmp_path / "x"
    )


def test_a_mark_at_the_beginning_of_config_json_is_read_over(there, tmp_path):
    (there / "config.json").write_text(
        "\ufeff" + (there / "config.json").read_text(), encoding="utf-8"
    )
    to_megatron.convert(there, tmp_path / "out")


def test_keys_that_are_absent_are_said_in_one_line(there, tmp_path, capfd):
    values = json.loads((there / "config.json").read_text())
    for name in ("num_experts_per_tok", "rms_norm_eps"):
        del values[name]
    (there / "config.json").write_text(json.dumps(values))
    (said,) = taken(there, tmp_path / "out", capfd)
    assert said == (
        "config.json lacks keys; transformers' defaults are used: num_experts_per_tok = 2,"
        " rms_norm_eps = 1e-05"
    )


def test_several_dtypes_are_refused_with_the_option_that_takes_them(there, tmp_path):
    change(there, lambda tensors: tensors | {GATE: tensors[GATE].bfloat16()})
    assert refused(there, tmp_path / "out").endswith(
        "all must be the same; --dtype fp32, bf16 or fp16 makes them so"
    )
    to_megatron.convert(there, tmp_path / "out", dtype=torch.bfloat16)


# --- called by its name

QUANTISED = {
    "quantised by GPTQ": {f"{Q}.qweight": torch.int32, f"{Q}.g_idx": torch.int32},
    "quantised by GPTQ or AWQ": {f"{Q}.qweight": torch.int32, f"{Q}.qzeros": torch.int32},
    "quantised by bitsandbytes (8 bits)": {f"{Q}.SCB": torch.float32},
    "quantised by bitsandbytes (4 bits)": {
        f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.uint8
    },
    "quantised by fp8 with scales of blocks": {f"{Q}.weight_scale_inv": torch.float32},
    "is F8_E4M3: the model is quantised by fp8": {f"{Q}.weight": torch.float8_e4m3fn},
    "is U8: the model is quantised by packing several numbers in a byte": {
        f"{Q}.weight": torch.uint8
    },
    "is I32: the model is quantised by packing several": {f"{Q}.weight": torch.int32},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_model_is_called_so_by_its_tensors(method, there, tmp_path):
    parts = {name: torch.zeros(4, dtype=dtype) for name, dtype in QUANTISED[method].items()}
    change(
        there,
        lambda tensors: {name: tensors[name] for name in tensors if name != f"{Q}.weight"} | parts,
    )
    said = refused(there, tmp_path / "out")
    assert method in said and said.endswith("give the unquantised model")
    change_config(there, quantization_config={"quant_method": "some_method"})
    assert refused(there, tmp_path / "out") == (
        f"{there / 'config.json'} has quantization_config (quantised by some_method); give the"
        " unquantised model"
    )


@pytest.mark.parametrize("value", [{"quant_method": "gptq", "bits": 4}, {}, 5, "awq"])
def test_a_note_of_quantisation_over_plain_weights_is_refused_by_both_tools(value, there, tmp_path):
    to_megatron.convert(there, tmp_path / "plain")
    change_config(there, quantization_config=value)
    said = refused(there, tmp_path / "out")
    assert (
        "has quantization_config (quantised by " in said
        and "no tensor is quantised: remove the key" in said
    )
    with pytest.raises(UserError, match="no tensor is quantised"):
        verify_conversion.main([str(there), str(tmp_path / "plain")])


def test_an_adapter_is_refused_with_the_call_that_merges_it(there, tmp_path):
    (there / "adapter_config.json").write_text("{}")
    (there / "model.safetensors").rename(there / "adapter_model.safetensors")
    said = refused(there, tmp_path / "out")
    call = shlex.split(said.partition("merge it first: ")[2].partition("; if these")[0])
    assert (
        f"{there} has adapter_config.json: a peft adapter, not a model; merge it first: python"
        " -c " in said
    )
    assert call[:2] == ["python", "-c"] and "merge_and_unload()" in said


def test_an_adapter_in_the_names_of_a_model_is_refused(there, tmp_path):
    change(there, lambda tensors: tensors | {f"{Q}.lora_A.weight": torch.zeros(2, 64)})
    assert refused(there, tmp_path / "out").startswith(
        f"{Q}.lora_A.weight belongs to a peft adapter that is not merged"
    )


@pytest.mark.parametrize(
    "name", ["consolidated.00.pth", "consolidated.safetensors", "consolidated.00.pt"]
)
def test_mistrals_own_format_is_refused_with_what_to_give(name, there, tmp_path):
    (there / "consolidated.safetensors").write_bytes(b"")
    to_megatron.convert(there, tmp_path / "both")  # as on the hub
    (there / "consolidated.safetensors").unlink()
    (there / "model.safetensors").rename(there / name)
    (there / "config.json").rename(there / "params.json")
    assert f"{there / name} is in Mistral's own format: give the files " in refused(
        there, tmp_path / "out"
    )


def test_a_shard_of_a_quantised_model_is_found_in_any_file(hub, tmp_path):
    folder = hf_models.copied(hub, tmp_path / "there")
    path = first_file(folder)
    tensors = load_file(path)
    save_file(tensors | {"a.qweight": torch.zeros(2, dtype=torch.int32)}, path)
    change_index(folder, lambda names: names.__setitem__("a.qweight", path.name))
    assert "a.qweight belongs to a model quantised by GPTQ or AWQ" in refused(
        folder, tmp_path / "out"
    )
    assert (
        unsupported_models.quantised_tensor({name: "F32" for name in hf_files.read_tensors(hub)})
        == ""
    )


# --- the proof never ends in a traceback

NO_PROOF = {
    "auto_map: ": dict(auto_map={"AutoModel": "m.M"}),
    "k_proj.weight has shape": dict(num_key_value_heads=None),
    "rope_scaling = ": dict(rope_scaling={"type": "yarn", "factor": 2}),
    "instead of rope_parameters": dict(rope_scaling={"type": "default"}),
    "model_type = null": dict(model_type=None),
}


@pytest.mark.parametrize("words", NO_PROOF)
def test_the_proof_refuses_what_a_conversion_refuses(words, there, converted):
    change_config(there, **NO_PROOF[words])
    with pytest.raises(UserError, match=words):
        verify_conversion.main([str(there), str(converted)])


@pytest.mark.long
@pytest.mark.parametrize("what, code, words", [
    (dict(torch_dtype="float9", dtype="auto"), 0, "the same model"),
    (dict(attention_dropout="much"), 2, "does not load it: "),
])  # fmt: skip
def test_the_proof_says_in_a_line_what_only_transformers_minds(what, code, words, there, converted):
    change_config(there, **what)
    done = tool("verify_conversion", there, converted, "--length", "8")
    assert (done.returncode, words in done.stdout + done.stderr) == (code, True), (
        done.stdout + done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_fused_layout_says_who_opens_it(converted, tmp_path):
    done = tool("convert_megatron_to_hf", converted, tmp_path / "fused", "--layout", "fused")
    assert done.returncode == 0 and "--layout fused: only transformers 5 opens this" in done.stderr
