"""Keep what a Hugging Face model has beside weights and architecture, from import to export.

Rule: the export has the imported values, except those that training changed: the token ids are the
source's as long as the tokenizer is the source's, and the coefficients of the router's losses are
the run's once it has trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtrain.checkpoint import state
from mixtrain.checkpoint.state import RunState
from mixtrain.config.choices import Balancing
from mixtrain.config.families import family_of
from mixtrain.config.schema import Config
from mixtrain.data.tokenizer import SPECIAL_IDS, special_ids, tokenizer_files, tokenizer_vocab_size
from mixtrain.errors import UserError
from mixtrain.interop.convert import hf_config
from mixtrain.interop.convert.hf_files import CONFIG, MAX_CONFIG
from mixtrain.system import untrusted_json
from mixtrain.system.links import file_in

GENERATION = "generation_config.json"
# the files that decide token ids; the first that exists counts
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def of_directory(
    directory: Path, config_json: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
    """Return RunState.hf_source of a directory. UserError if run_state.json could not hold it."""
    source = {
        "config": hf_config.passthrough_values(config_json),
        "tokenizer": vocabulary_sha256(directory),
        "vocab_size": vocab_size,
    }
    if path := file_in(directory, GENERATION):
        source["generation_config"] = untrusted_json.read(path, most=MAX_CONFIG)
    try:
        untrusted_json.parse(state.to_json(RunState(hf_source=source)), state.RunStateFile)
    except untrusted_json.InvalidJson as error:
        raise UserError(
            f"{directory / CONFIG} or {GENERATION} cannot be kept in a checkpoint: {error}"
        ) from None
    return source


def vocabulary_sha256(directory: Path) -> str:
    """Return the SHA-256 of the file that decides a tokenizer's ids; empty if there is none."""
    files = tokenizer_files(directory)
    path = next((files[name] for name in VOCABULARY_FILES if name in files), None)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def unpadded_vocab_size(run_state: RunState, config: Config, tokenizer: Path | None) -> int:
    """Return how many rows of the vocabulary to export: without the padding of a conversion.

    Padding rows that the tokenizer has tokens for are exported: training gave them a meaning.
    """
    size = config.model.vocab_size
    if run_state.hf_source is None or run_state.hf_source["vocab_size"] >= size:
        return size
    tokens = 0
    if tokenizer and (tokenizer / "tokenizer.json").is_file():
        tokens = tokenizer_vocab_size(tokenizer)
    return min(max(run_state.hf_source["vocab_size"], tokens), size)


def to_export(
    run_state: RunState, config: Config, tokenizer: Path | None
) -> tuple[dict[str, Any], dict | None]:
    """Return (config.json beside the architecture, generation_config.json).

    The second is None if there is none, or if the tokenizer's files have one.
    """
    imported = run_state.hf_source is not None
    source = run_state.hf_source or {"config": {}, "tokenizer": ""}
    model_type = family_of(config).model_type
    # filter again: the checkpoint may not come from mixtrain
    values = hf_config.passthrough_values(source["config"] | {"model_type": model_type})
    source_ids = {name: values[name] for name in SPECIAL_IDS if name in values}
    generation = source.get("generation_config")
    if tokenizer is None or (imported and vocabulary_sha256(tokenizer) == source["tokenizer"]):
        ids = _ids_of_tokenizer(tokenizer) | source_ids
    elif imported and not source["tokenizer"]:
        # the source had no tokenizer; this one may be its tokenizer
        ids = source_ids | {
            name: _id_or_source_list(value, source_ids.get(name))
            for name, value in _ids_of_tokenizer(tokenizer).items()
        }
    else:
        ids = dict.fromkeys(SPECIAL_IDS) | _ids_of_tokenizer(tokenizer)
        generation = None
    if not imported:
        # null, because transformers gives a missing key Mixtral's own id
        ids = dict.fromkeys(SPECIAL_IDS) | ids
    if tokenizer and GENERATION in tokenizer_files(tokenizer):
        generation = None
    return values | ids | (_router_values(config) if run_state.step else {}), generation


def _ids_of_tokenizer(tokenizer: Path | None) -> dict[str, Any]:
    """Return the special ids of a tokenizer's files; generation_config.json has the rest."""
    if tokenizer is None:
        return {}
    path = tokenizer_files(tokenizer).get(GENERATION)
    generation = untrusted_json.read(path, most=MAX_CONFIG) if path else {}
    ids = {name: generation[name] for name in SPECIAL_IDS if generation.get(name) is not None}
    return ids | special_ids(tokenizer)


def _id_or_source_list(token_id: Any, source_id: Any) -> Any:
    """Return the source's list of ids if the tokenizer's id is in it, else the tokenizer's id."""
    return source_id if isinstance(source_id, list) and token_id in source_id else token_id


def _router_values(config: Config) -> dict[str, float]:
    """Return the router's loss coefficient and jitter of a run, under transformers' keys."""
    router = config.router
    coefficients = dict(
        zip(router.moe_router_load_balancing_type, router.moe_aux_loss_coeff, strict=False)
    )
    # transformers has one coefficient
    losses = (Balancing.aux_loss, Balancing.global_aux_loss, Balancing.seq_aux_loss)
    coefficient = next((coefficients[loss] for loss in losses if loss in coefficients), 0.0)
    values = {"router_aux_loss_coef": coefficient}
    if family_of(config).jitter:
        values["router_jitter_noise"] = router.moe_input_jitter_eps or 0.0
    return values
