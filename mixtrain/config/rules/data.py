"""Rules about the data keys that need no look at a file. No torch."""

from __future__ import annotations

import os

from mixtrain.config.choices import DataKind
from mixtrain.config.data_blend import duplicate_problems, parse_blend, split_weights
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import Problems
from mixtrain.errors import UserError


def sequence_within_positions(plan: Plan) -> Problems:
    length = plan.config.data.seq_length
    positions = plan.config.model.max_position_embeddings
    if length > positions:
        yield (
            f"data.seq_length = {length} must be at most model.max_position_embeddings ="
            f" {positions}"
        )


def data_source_is_given(plan: Plan) -> Problems:
    data = plan.config.data
    if data.kind is DataKind.indexed and not data.data_path:
        yield "data.kind = indexed needs data.data_path=[PREFIX]; it is empty"
    if data.kind is DataKind.indexed and not data.tokenizer:
        yield "data.kind = indexed needs data.tokenizer=DIRECTORY; it is null"
    if data.kind is not DataKind.indexed and data.data_path:
        yield (
            f"data.data_path is set, but data.kind = {data.kind.name} reads no files; type"
            " data=indexed"
        )


def split_has_three_parts(plan: Plan) -> Problems:
    split = plan.config.data.split
    try:
        _, validation, _ = split_weights(split)
    except UserError as error:
        yield from error.problems
        return
    if validation == 0 and plan.config.trainer.limit_val_batches:
        yield (
            f'data.split = "{split}" leaves nothing to validate on; use'
            " trainer.limit_val_batches=0 or a second part"
        )


def data_is_named_once(plan: Plan) -> Problems:
    """Refuse a prefix that is listed twice; data/check.py finds two names of the same file."""
    data = plan.config.data
    if data.kind is not DataKind.indexed or not data.data_path:
        return
    try:
        prefixes, _ = parse_blend(data.data_path)
    except UserError as error:
        yield from error.problems
        return
    yield from duplicate_problems(
        {prefix: os.path.abspath(prefix) for prefix in prefixes}, prefixes
    )


RULES = [sequence_within_positions, data_source_is_given, data_is_named_once, split_has_three_parts]
