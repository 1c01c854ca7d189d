"""Recognize quantised models, adapters and other formats, and say what to use instead. No torch.

Rule: a model recognized by its files, its tensor names or its dtypes is named in the message before
any tensor is looked for.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtrain.config.key_effects import show
from mixtrain.errors import UserError

HF_FILES = ("model.safetensors", "model.safetensors.index.json")
GIVE = "give the unquantised model"
MERGE = (
    "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{0}').merge_and_unload()"
    ".save_pretrained('{0}-merged')"
)
# suffix of a tensor's name -> the method that writes such tensors; the first match counts
METHODS_BY_SUFFIX = {
    ".g_idx": "GPTQ",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes (8 bits)",
    ".weight_format": "bitsandbytes (8 bits)",
    ".quant_state": "bitsandbytes (4 bits)",
    ".absmax": "bitsandbytes (4 bits)",
    ".quant_map": "bitsandbytes (4 bits)",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8 with scales of blocks",
    ".weight_scale": "fp8 with scales",
}
METHODS_BY_DTYPE = {
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "U8": "packing several numbers in a byte",
    "I8": "8-bit whole numbers",
    "I32": "packing several numbers in an integer",
}


def refuse(directory: Path) -> None:
    """UserError if a directory holds a peft adapter or a model in Mistral's own format."""
    if (directory / "adapter_config.json").exists():
        call = shlex.quote(MERGE.format(str(directory).rstrip("/").replace("'", r"\'")))
        raise UserError(
            f"{directory} has adapter_config.json: a peft adapter, not a model; merge it first:"
            f" python -c {call}; if these weights are merged already, remove adapter_config.json"
        )
    if directory.is_dir() and not any((directory / name).exists() for name in HF_FILES):
        names = sorted(path.name for path in directory.iterdir())
        if mistral := [name for name in names if name.startswith("consolidated.")]:
            raise UserError(
                f"{directory / mistral[0]} is in Mistral's own format: give the files of the same"
                f" model on the hub that have Hugging Face's names ({HF_FILES[1]} and"
                " model-00001-of-....safetensors, config.json)"
            )


def quantised_tensor(dtypes: Mapping[str, str]) -> str:
    """Return a sentence about a quantised tensor and its method; empty if there is none.

    `dtypes`: tensor name -> safetensors dtype.
    """
    for suffix, method in METHODS_BY_SUFFIX.items():
        for name in dtypes:
            if name.endswith(suffix) or f"{suffix}." in name:
                return f"{name} belongs to a model quantised by {method}; {GIVE}"
    for name, dtype in dtypes.items():
        if method := METHODS_BY_DTYPE.get(dtype):
            return f"{name} is {dtype}: the model is quantised by {method}; {GIVE}"
    return ""


def quantisation_key(config_json: Mapping[str, Any]) -> str:
    """Return the key of a config.json that names a quantisation, and the method; empty if none."""
    for key in ("quantization_config", "compression_config"):
        value = config_json.get(key)
        if value is None:
            continue
        if isinstance(value, Mapping):
            value = value.get("quant_method", "an unknown method")
        return f"{key} (quantised by {show(value)})"
    return ""
