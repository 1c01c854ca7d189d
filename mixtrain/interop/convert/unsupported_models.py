"""Directories that hold something else than a model's plain weights: what they are, and what to give instead. No torch.

Rule: what is known by its files, its names or its dtypes is said by its own name, before a tensor is looked for.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtrain.config.key_effects import show
from mixtrain.errors import UserError

USUAL = ("model.safetensors", "model.safetensors.index.json")
GIVE = "give the unquantised model"
MERGE = (
    "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{0}').merge_and_unload()"
    ".save_pretrained('{0}-merged')"
)
# Ends of tensors' names -> what has quantised a model that has them; the first that fits.
ENDS = {
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
KINDS = {
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "U8": "packing several numbers in a byte",
    "I8": "8-bit whole numbers",
}
KINDS |= {"I32": "packing several numbers in an integer"}


def refuse(directory: Path) -> None:
    """UserError if a directory is an adapter, or a model in Mistral's own files."""
    if (directory / "adapter_config.json").exists():
        call = shlex.quote(MERGE.format(str(directory).rstrip("/").replace("'", r"\'")))
        raise UserError(
            f"{directory} has adapter_config.json: an adapter of peft, not a model; merge it"
            f" first: python -c {call}; if these weights are merged already, take"
            " adapter_config.json away"
        )
    if directory.is_dir() and not any((directory / name).exists() for name in USUAL):
        own = sorted(
            path.name for path in directory.iterdir() if path.name.startswith("consolidated.")
        )
        if own:
            raise UserError(
                f"{directory / own[0]} is in Mistral's own format: give the files of the same"
                f" model on the hub that have Hugging Face's names ({USUAL[1]} and"
                " model-00001-of-....safetensors, config.json)"
            )


def quantised(dtypes: Mapping[str, str]) -> str:
    """What has quantised a model with tensors of these names and safetensors dtypes, in a sentence; "" if nothing."""
    for end, method in ENDS.items():
        if name := next((name for name in dtypes if name.endswith(end) or f"{end}." in name), None):
            return f"{name} is of a model that is quantised by {method}; {GIVE}"
    for name, dtype in dtypes.items():
        if dtype in KINDS:
            return f"{name} is {dtype}: the model is quantised by {KINDS[dtype]}; {GIVE}"
    return ""


def quantisation(values: Mapping[str, Any]) -> str:
    """The key of a config.json that says how its model is quantised, with the method; "" if none does."""
    for key in ("quantization_config", "compression_config"):
        if (there := values.get(key)) is not None:
            method = (
                there.get("quant_method", "an unknown method")
                if isinstance(there, Mapping)
                else there
            )
            return f"{key} (quantised by {show(method)})"
    return ""
