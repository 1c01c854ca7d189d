"""A directory of Hugging Face as one model: what config.json says, and its tensors under the names of the hub.

Rule: a tensor that is there beside the model's is left out where it says what the model says anyway, and that is said;
where it says something else the directory is refused.
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
from mixtrain.interop.convert.hf_files import CONFIG, INDEX, SINGLE, Stored

BLOCK = 1 << 24  # elements
# peft's, DistributedDataParallel's, torch.compile's
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
ADAPTED = (".lora_A.", ".lora_B.", ".base_layer.", ".modules_to_save.")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class Source(NamedTuple):
    """What was found in a directory, all of it checked but the tensors' shapes."""

    values: dict[str, Any]  # config.json
    facts: dict[str, Any]  # the same by our keys
    tensors: dict[str, Stored]
    notes: list[str]  # what is taken otherwise than it stands there

    def vocabulary(self, run_state: RunState, config: Config) -> int:
        """The rows of a checkpoint's vocabulary that are to be compared with the directory's."""
        here = self.facts["model.vocab_size"]
        there = config.model.vocab_size
        source = run_state.hf_source
        return here if source and source["vocab_size"] <= here <= there else there


def read(directory: Path) -> Source:
    """What is in a directory. UserError with what is wrong, naming the file, the key or the tensor."""
    values = hf_files.read_config(directory)
    quantised = unsupported_models.quantisation(values)
    try:
        tensors = hf_files.read_tensors(directory)
    except UserError:
        if quantised:
            raise UserError(
                f"{directory / CONFIG} has {quantised}; {unsupported_models.GIVE}"
            ) from None
        raise
    if quantised:
        raise UserError(
            f"{directory / CONFIG} has {quantised}, but no tensor is quantised: take the key out"
            f" if these are the plain weights, or {unsupported_models.GIVE}"
        )
    facts = hf_config.from_hugging_face(values)
    notes = []
    if absent := hf_config.absent(values):
        notes.append(
            f"{CONFIG} says nothing of {', '.join(absent)}: transformers' default is taken"
        )
    if not (directory / INDEX).exists() and not (directory / SINGLE).exists():
        notes.append(f"{next(iter(tensors.values())).path.name} is taken for {SINGLE}")
    for step in (_unwrapped, _without_frequencies, _without_a_tied_head):
        tensors = step(tensors, facts, notes.append)
    return Source(values, facts, tensors, notes)


Say = Callable[[str], None]


def _unwrapped(tensors: dict[str, Stored], facts: dict[str, Any], say: Say) -> dict[str, Stored]:
    """The names without what wrappers put before all of them."""
    if adapted := next((name for name in tensors if any(part in name for part in ADAPTED)), None):
        raise UserError(
            f"{adapted} is of an adapter of peft that is not merged: merge_and_unload() merges it"
        )
    while prefix := next(
        (each for each in WRAPPERS if tensors and all(name.startswith(each) for name in tensors)),
        "",
    ):
        tensors = {name.removeprefix(prefix): stored for name, stored in tensors.items()}
        say(f"{prefix} is taken off the names of all {len(tensors)} tensors")
    return tensors


def _without_frequencies(
    tensors: dict[str, Stored], facts: dict[str, Any], say: Say
) -> dict[str, Stored]:
    """Without buffers of the rotary embedding, which follow from its base."""
    names = [name for name in tensors if FREQUENCIES.fullmatch(name)]
    size = facts["model.kv_channels"]
    base = facts["model.rotary_base"]
    expected = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    for name in names:
        stored = tensors[name]
        # as computed in this dtype, and the smallest number that it has
        close = {
            "rtol": 8 * torch.finfo(stored.dtype).eps,
            "atol": torch.finfo(stored.dtype).smallest_normal,
        }
        if stored.shape != (len(expected),) or not torch.allclose(
            whole(stored).double(), expected, **close
        ):
            raise UserError(
                f"{name} is not what head_dim = {size} and rope_theta = {base} make of it"
                " (transformers computes it and does not read it): is rope_theta right? else take"
                " the tensor away"
            )
    if names:
        say(f"{names[0]}{_more(names)} is left out: it is what rope_theta = {base} makes")
    return {name: stored for name, stored in tensors.items() if name not in names}


def _without_a_tied_head(
    tensors: dict[str, Stored], facts: dict[str, Any], say: Say
) -> dict[str, Stored]:
    """Without an output layer that is the embedding, where config.json says so."""
    if (
        facts["model.untie_embeddings_and_output_weights"]
        or not {EMBEDDING, HEAD} <= tensors.keys()
    ):
        return tensors
    if not equal(tensors[EMBEDDING], tensors[HEAD]):
        raise UserError(
            f"{HEAD} and {EMBEDDING} are not equal, but config.json has tie_word_embeddings ="
            f" true: with false both are converted; without {HEAD} the embedding is used twice"
        )
    say(f"{HEAD} is left out: it is equal to {EMBEDDING}, and tie_word_embeddings = true")
    return {name: stored for name, stored in tensors.items() if name != HEAD}


def whole(stored: Stored) -> torch.Tensor:
    return stored.part(0, stored.nbytes // stored.dtype.itemsize)


def equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    count = one.nbytes // one.dtype.itemsize
    return all(
        torch.equal(
            *(
                each.part(start, min(start + BLOCK, count)).view(torch.uint8)
                for each in (one, other)
            )
        )
        for start in range(0, count, BLOCK)
    )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} like it)" if len(names) > 1 else ""
