"""Where the tokenizer of a checkpoint lies. No torch.

Rule: it is the one that the run was trained with, or the one that was given; never one that only happens to be there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from mixtrain.checkpoint.state import RunState
from mixtrain.convert.origin import TOKENIZER
from mixtrain.data.fingerprint import DIGITS, add_files
from mixtrain.data.tokenizer import tokenizer_vocab_size
from mixtrain.errors import UserError

GIVE = "give --tokenizer DIRECTORY"


def directory_of(given: str | None, checkpoint: Path, run: RunState, vocab_size: int) -> str:
    """The tokenizer's directory; UserError if there is none, or it has more tokens than the model."""
    found = Path(given) if given else _of_run(checkpoint, run)
    tokens = tokenizer_vocab_size(found)
    if tokens > vocab_size:
        raise UserError(f"{found} has {tokens} tokens, more than model.vocab_size = {vocab_size}; {GIVE} of this model")
    return str(found)


def _of_run(checkpoint: Path, run: RunState) -> Path:
    """Beside the checkpoint, where a conversion puts it; else what the run's configuration names."""
    if (beside := checkpoint.resolve().parent / TOKENIZER).is_dir():
        return beside
    data = run.config.get("data", {})
    named = data.get("tokenizer")
    places = list(_bases(checkpoint, run))
    if named:
        for base in places:
            if (base / named / "tokenizer.json").is_file():
                return base / named
        raise UserError(f"data.tokenizer = {named} of the run is not there; {GIVE}")
    if data.get("kind") != "stdlib":
        raise UserError(f"the run has no tokenizer (data.kind = {data.get('kind')}); {GIVE}")
    for base in places:
        for index in sorted((base / data["path_to_cache"]).glob("stdlib-*/text.idx")):
            if documents(index.with_suffix("")) == run.data.get("documents"):
                return index.with_name("text-tokenizer")
    raise UserError(f"the tokenizer of the run is not in data.path_to_cache = {data['path_to_cache']} any more; {GIVE}")


def _bases(checkpoint: Path, run: RunState) -> Iterator[Path]:
    """What the relative paths of the run start from: here, or where it was started, which its run_dir tells."""
    yield Path()
    parts, tail = checkpoint.resolve().parent.parts, Path(run.config.get("run_dir", "")).parts
    if tail and parts[-len(tail) :] == tail:
        yield Path(*parts[: -len(tail)])


def documents(prefix: Path) -> str:
    """The fingerprint of a run on this text alone: fingerprint.py's."""
    digest = hashlib.sha256(f"{1:.9f} ".encode())
    add_files(digest, str(prefix))
    return digest.hexdigest()[:DIGITS]
