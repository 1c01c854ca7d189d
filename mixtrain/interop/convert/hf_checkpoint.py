"""Read the directory of a Hugging Face model: config.json, and tensors under the hub's names.

Rule: a tensor that the model does not have is left out with a note if it repeats what the model
already says, and the directory is refused if it contradicts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mixtrain.checkpoint.state import RunState
from mixtrain.config.schema import Config
from mixtrain.errors import UserError
from mixtrain.interop.convert import hf_config, hf_files, unsupported_models
from mixtrain.interop.convert.hf_files import CONFIG, INDEX, SINGLE, StoredTensor

BLOCK = 1 << 24  # elements
# of peft, DistributedDataParallel, torch.compile
WRAPPER_PREFIXES = ("base_model.model.", "module.", "_orig_mod.")
ADAPTER_MARKS = (".lora_A.", ".lora_B.", ".base_layer.", ".modules_to_save.")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INV_FREQ = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

Tensors = dict[str, StoredTensor]
AddNote = Callable[[str], None]


class HfCheckpoint(NamedTuple):
    """A Hugging Face model on disk, checked except for the shapes of its tensors."""

    config_json: dict[str, Any]
    overrides: dict[str, Any]  # key of Config -> value, from config_json
    tensors: Tensors
    notes: list[str]  # what is read differently from how it is stored

    def compared_vocab_size(self, run_state: RunState, config: Config) -> int:
        """Return how many rows of a checkpoint's vocabulary to compare with this directory's."""
        hf_rows = self.overrides["model.vocab_size"]
        megatron_rows = config.model.vocab_size
        source = run_state.hf_source
        padded = source and source["vocab_size"] <= hf_rows <= megatron_rows
        return hf_rows if padded else megatron_rows


def read(directory: Path) -> HfCheckpoint:
    """Read a directory. UserError naming the file, the key or the tensor that is wrong."""
    config_json = hf_files.read_config(directory)
    quantised = unsupported_models.quantisation_key(config_json)
    give = unsupported_models.GIVE
    try:
        tensors = hf_files.read_tensors(directory)
    except UserError:
        if quantised:
            raise UserError(f"{directory / CONFIG} has {quantised}; {give}") from None
        raise
    if quantised:
        raise UserError(
            f"{directory / CONFIG} has {quantised}, but no tensor is quantised: remove the key if"
            f" these are the plain weights, or {give}"
        )
    overrides = hf_config.from_hugging_face(config_json)
    notes = []
    if defaulted := hf_config.defaulted_keys(config_json):
        notes.append(
            f"{CONFIG} lacks keys; transformers' defaults are used: {', '.join(defaulted)}"
        )
    if not (directory / INDEX).exists() and not (directory / SINGLE).exists():
        notes.append(f"{next(iter(tensors.values())).path.name} is used as {SINGLE}")
    for clean in (_strip_wrapper_prefixes, _drop_inv_freq, _drop_tied_head):
        tensors = clean(tensors, overrides, notes.append)
    return HfCheckpoint(config_json, overrides, tensors, notes)


def _strip_wrapper_prefixes(
    tensors: Tensors, overrides: dict[str, Any], add_note: AddNote
) -> Tensors:
    """Remove prefixes that wrappers add to all names."""
    for name in tensors:
        if any(mark in name for mark in ADAPTER_MARKS):
            raise UserError(
                f"{name} belongs to a peft adapter that is not merged: merge_and_unload() merges it"
            )
    while prefix := _common_prefix(tensors):
        tensors = {name.removeprefix(prefix): stored for name, stored in tensors.items()}
        add_note(f"{prefix} is removed from the names of all {len(tensors)} tensors")
    return tensors


def _common_prefix(tensors: Tensors) -> str:
    """Return the wrapper prefix that all names have, or an empty string."""
    for prefix in WRAPPER_PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return prefix
    return ""


def _drop_inv_freq(tensors: Tensors, overrides: dict[str, Any], add_note: AddNote) -> Tensors:
    """Leave out the rotary embedding's buffers; UserError if the base gives other values."""
    names = [name for name in tensors if INV_FREQ.fullmatch(name)]
    size = overrides["model.kv_channels"]
    base = overrides["model.rotary_base"]
    expected = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    for name in names:
        stored = tensors[name]
        limits = torch.finfo(stored.dtype)
        close = {"rtol": 8 * limits.eps, "atol": limits.smallest_normal}  # rounding in this dtype
        equal = stored.shape == (len(expected),) and torch.allclose(
            flat(stored).double(), expected, **close
        )
        if not equal:
            raise UserError(
                f"{name} does not match head_dim = {size} and rope_theta = {base} (transformers"
                " computes this buffer and does not read it): correct rope_theta, or remove the"
                " tensor"
            )
    if names:
        more = f" (and {len(names) - 1} like it)" if len(names) > 1 else ""
        add_note(f"{names[0]}{more} is left out: rope_theta = {base} gives the same values")
    return {name: stored for name, stored in tensors.items() if name not in names}


def _drop_tied_head(tensors: Tensors, overrides: dict[str, Any], add_note: AddNote) -> Tensors:
    """Leave out the output layer of a tied model; UserError if it differs from the embedding."""
    untied = overrides["model.untie_embeddings_and_output_weights"]
    if untied or not {EMBEDDING, HEAD} <= tensors.keys():
        return tensors
    if not bitwise_equal(tensors[EMBEDDING], tensors[HEAD]):
        raise UserError(
            f"{HEAD} and {EMBEDDING} are not equal, but config.json has tie_word_embeddings ="
            f" true: with false both are converted; without {HEAD} the embedding is used twice"
        )
    add_note(f"{HEAD} is left out: it is equal to {EMBEDDING}, and tie_word_embeddings = true")
    return {name: stored for name, stored in tensors.items() if name != HEAD}


def flat(stored: StoredTensor) -> torch.Tensor:
    """Return the whole tensor, flattened."""
    return stored.read(0, stored.numel)


def bitwise_equal(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    for start in range(0, a.numel, BLOCK):
        stop = min(start + BLOCK, a.numel)
        block_a, block_b = (stored.read(start, stop).view(torch.uint8) for stored in (a, b))
        if not torch.equal(block_a, block_b):
            return False
    return True
