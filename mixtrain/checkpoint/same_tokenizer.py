"""Whether weights and text have one tokenizer: token ids of another would train or ask a model for other words.

Rule: tokenizers are compared by what decides the ids of a text, not by the bytes of their files. No torch.
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

# of tokenizer.json, the ids of a text
DECIDE = ("normalizer", "pre_tokenizer", "model", "added_tokens")
DIGITS = 12  # of a sha256


def same(one: Path, other: Path) -> bool:
    """Whether two tokenizers give every text the same ids. UserError if one cannot be read."""
    return tokenizer_sha256(one) == tokenizer_sha256(other) or _deciding(one) == _deciding(other)


def _deciding(path: Path) -> list:
    """The parts that decide, as the tokenizers library writes them: whoever wrote them before."""
    written = json.loads(load_tokenizer(path).to_str())
    return [written[part] for part in DECIDE]


def told(path: Path) -> str:
    return f"{path} (sha256 {tokenizer_sha256(path)[:DIGITS]})"


def beside(checkpoint: Path) -> Path | None:
    """The tokenizer that lies beside a checkpoint, where runs and conversions put it, if it can be compared."""
    found = checkpoint.resolve().parent / TOKENIZER
    return found if (found / "tokenizer.json").is_file() else None


def starts_from(config: Config) -> Path | None:
    """The checkpoint that a run would go on from or take its weights from; whether it is valid is not asked."""
    if config.checkpoint.resume is not Resume.never and (
        steps := directory.steps_in(config.run_dir)
    ):
        return directory.path_of(config.run_dir, steps[0])
    given = config.checkpoint.load_weights
    return directory.newest(given) if given else None


def problem(config: Config, tokenizer: Path) -> str | None:
    """What is wrong where a run's tokenizer is not that of the weights it starts from."""
    checkpoint = starts_from(config)
    own = beside(checkpoint) if checkpoint else None
    if (
        own is None
        or model_differences.TOKENIZER in config.checkpoint.acknowledge_differences
        or same(tokenizer, own)
    ):
        return None
    return (
        f"data.tokenizer = {told(tokenizer)} is not the tokenizer of {checkpoint}, {told(own)};"
        f" prepare the data with that and type data.tokenizer={own}, or name data.tokenizer in"
        f" {model_differences.KEY}"
    )


def refuse_other(given: Path, own: Path | None, checkpoint: Path) -> None:
    """UserError if the tokenizer given to a tool is not the checkpoint's own, where that is known."""
    if own and (own / "tokenizer.json").is_file() and not same(given, own):
        raise UserError(
            f"--tokenizer {told(given)} is not the tokenizer of {checkpoint}, {told(own)}; leave"
            " it out, or add --allow-other-tokenizer"
        )
