"""What a model of Hugging Face came with beside its weights and its architecture, and what of that goes out again.

Rule: what came in goes out, unless training has changed it: the ids of a text's beginning and end are those of the
source while the tokenizer is the source's, and the coefficients of the router's losses are the run's once it trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtrain.checkpoint import state
from mixtrain.checkpoint.state import RunState
from mixtrain.config.choices import Balancing
from mixtrain.config.schema import Config
from mixtrain.data.tokenizer import SPECIAL_IDS, special_ids, tokenizer_files, tokenizer_vocab_size
from mixtrain.errors import UserError
from mixtrain.interop.convert import settings
from mixtrain.interop.convert.hf_files import CONFIG, MOST_CONFIG
from mixtrain.system import untrusted_json
from mixtrain.system.links import file_in

GENERATION = "generation_config.json"
# the first that is there decides the ids
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json")


def of_directory(directory: Path, values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The HfSource of a directory whose config.json is `values`. UserError if the checkpoint could not keep it."""
    found = {
        "config": settings.beside_the_architecture(values),
        "tokenizer": vocabulary_sha256(directory),
        "vocab_size": vocab_size,
    }
    if path := file_in(directory, GENERATION):
        found["generation_config"] = untrusted_json.read(path, most=MOST_CONFIG)
    try:
        untrusted_json.parse(state.to_json(RunState(hf_source=found)), state.RunStateFile)
    except untrusted_json.InvalidJson as error:
        raise UserError(
            f"{directory / CONFIG} or {GENERATION} cannot be kept in a checkpoint: {error}"
        ) from None
    return found


def vocabulary_sha256(directory: Path) -> str:
    """Of the file that decides a tokenizer's ids; "" if there is none."""
    found = tokenizer_files(directory)
    path = next((found[name] for name in VOCABULARY if name in found), None)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def rows(run_state: RunState, config: Config, tokenizer: Path | None) -> int:
    """How many rows of the vocabulary are a model's own: without those that a conversion added to be divisible.

    With a tokenizer of more tokens than the source had, as many as it has: training has given them a meaning.
    """
    size = config.model.vocab_size
    if run_state.hf_source is None or run_state.hf_source["vocab_size"] >= size:
        return size
    tokens = (
        tokenizer_vocab_size(tokenizer)
        if tokenizer and (tokenizer / "tokenizer.json").is_file()
        else 0
    )
    return min(max(run_state.hf_source["vocab_size"], tokens), size)


def to_export(
    run_state: RunState, config: Config, tokenizer: Path | None
) -> tuple[dict[str, Any], dict | None]:
    """(what config.json has beside the architecture, generation_config.json if the tokenizer has none)."""
    source = run_state.hf_source or {"config": {}, "tokenizer": ""}
    # filtered once more: whoever has written the checkpoint may have added to it
    kept = settings.beside_the_architecture(
        source["config"] | {"model_type": settings.architecture_of(config).model_type}
    )
    of_source = {name: kept[name] for name in SPECIAL_IDS if name in kept}
    generation = source.get("generation_config")
    if tokenizer is None or (
        run_state.hf_source and vocabulary_sha256(tokenizer) == source["tokenizer"]
    ):
        ids = _of_tokenizer(tokenizer) | of_source
    # the source had none: this may be its own
    elif run_state.hf_source and not source["tokenizer"]:
        ids = of_source | {
            name: _either(of_source.get(name), own)
            for name, own in _of_tokenizer(tokenizer).items()
        }
    else:
        ids = dict.fromkeys(SPECIAL_IDS) | _of_tokenizer(tokenizer)
        generation = None
    # transformers would take Mixtral's own for a key that is not there
    if run_state.hf_source is None:
        ids = dict.fromkeys(SPECIAL_IDS) | ids
    if tokenizer and GENERATION in tokenizer_files(tokenizer):
        generation = None
    return kept | ids | (_trained(config) if run_state.step else {}), generation


def _of_tokenizer(tokenizer: Path | None) -> dict[str, Any]:
    """The ids that a tokenizer's files name; those that they have no token for, of its generation_config.json."""
    if tokenizer is None:
        return {}
    path = tokenizer_files(tokenizer).get(GENERATION)
    generation = untrusted_json.read(path, most=MOST_CONFIG) if path else {}
    named = {name: generation[name] for name in SPECIAL_IDS if generation.get(name) is not None}
    return named | special_ids(tokenizer)


def _either(source: Any, own: Any) -> Any:
    """The source's list of ids, if the tokenizer's own is among them."""
    return source if isinstance(source, list) and own in source else own


def _trained(config: Config) -> dict[str, float]:
    """What the router was trained with, in transformers' words."""
    router = config.router
    weights = dict(
        zip(router.moe_router_load_balancing_type, router.moe_aux_loss_coeff, strict=False)
    )
    kinds = (Balancing.aux_loss, Balancing.global_aux_loss, Balancing.seq_aux_loss)
    found = {
        "router_aux_loss_coef": next((weights[kind] for kind in kinds if kind in weights), 0.0)
    }
    if settings.architecture_of(config) is settings.MIXTRAL:
        found["router_jitter_noise"] = router.moe_input_jitter_eps or 0.0
    return found
