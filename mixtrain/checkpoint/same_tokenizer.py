"""Check that weights and text use one tokenizer: another gives other token ids. No torch.

Rule: tokenizers are compared by what determines token ids, not by the bytes of their files.
"""

from __future__ import annotations

import json
from pathlib import Path

from mixtrain.checkpoint import directory
from mixtrain.config import model_differences
from mixtrain.config.choices import Resume
from mixtrain.config.schema import Config
from mixtrain.data.tokenizer import TOKENIZER, load_tokenizer, tokenizer_sha256
from mixtrain.errors import UserError

# the sections of tokenizer.json that determine token ids
ID_SECTIONS = ("normalizer", "pre_tokenizer", "model", "added_tokens")
DIGITS = 12  # of a SHA-256, in messages


def same_ids(first: Path, second: Path) -> bool:
    """Return whether two tokenizers give every text the same ids. UserError if one is damaged."""
    if tokenizer_sha256(first) == tokenizer_sha256(second):
        return True
    return _id_sections(first) == _id_sections(second)


def _id_sections(path: Path) -> list:
    """Return the sections that determine ids, normalized by the tokenizers library."""
    tokenizer = json.loads(load_tokenizer(path).to_str())
    return [tokenizer[section] for section in ID_SECTIONS]


def with_digest(path: Path) -> str:
    return f"{path} (sha256 {tokenizer_sha256(path)[:DIGITS]})"


def tokenizer_of(checkpoint: Path) -> Path | None:
    """Return the tokenizer that runs and conversions write beside a checkpoint; None if none."""
    tokenizer = checkpoint.resolve().parent / TOKENIZER
    return tokenizer if (tokenizer / "tokenizer.json").is_file() else None


def starting_checkpoint(config: Config) -> Path | None:
    """Return the checkpoint from which a run would resume or load weights, without checking it."""
    if config.checkpoint.resume is not Resume.never and (
        steps := directory.steps_in(config.run_dir)
    ):
        return directory.path_of(config.run_dir, steps[0])
    weights = config.checkpoint.load_weights
    return directory.newest(weights) if weights else None


def problem(config: Config, tokenizer: Path) -> str | None:
    """Return what is wrong if a run's tokenizer is not that of the weights it starts from."""
    checkpoint = starting_checkpoint(config)
    expected = tokenizer_of(checkpoint) if checkpoint else None
    if (
        expected is None
        or model_differences.TOKENIZER in config.checkpoint.acknowledge_differences
        or same_ids(tokenizer, expected)
    ):
        return None
    return (
        f"data.tokenizer = {with_digest(tokenizer)} is not the tokenizer of {checkpoint},"
        f" {with_digest(expected)}; prepare the data with that and type"
        f" data.tokenizer={expected}, or name data.tokenizer in {model_differences.KEY}"
    )


def refuse_other(given: Path, expected: Path | None, checkpoint: Path) -> None:
    """Raise UserError if a tool's --tokenizer is not the checkpoint's, provided that is known."""
    known = expected and (expected / "tokenizer.json").is_file()
    if known and not same_ids(given, expected):
        raise UserError(
            f"--tokenizer {with_digest(given)} is not the tokenizer of {checkpoint},"
            f" {with_digest(expected)}; leave it out, or add --allow-other-tokenizer"
        )
