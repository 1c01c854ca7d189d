"""Where the tokenizer of a checkpoint lies. No torch.

Rule: it is the one that the run was trained with, or the one that was given; never one that only
happens to be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mixtrain.checkpoint.same_tokenizer import refuse_other
from mixtrain.checkpoint.state import RunState
from mixtrain.data.tokenizer import TOKENIZER, tokenizer_vocab_size
from mixtrain.errors import UserError

GIVE = "give --tokenizer DIRECTORY"


def directory_of(
    given: str | None, checkpoint: Path, run: RunState, vocab_size: int, allow_other: bool = False
) -> str:
    """The tokenizer's directory; UserError if there is none, it is not the run's, or has more tokens than the model."""
    found = Path(given) if given else _of_run(checkpoint, run)
    if given and not allow_other:
        own = None
        with suppress(UserError):  # of mock data, or moved away: there is nothing to compare with
            own = _of_run(checkpoint, run)
        refuse_other(found, own, checkpoint)
    tokens = tokenizer_vocab_size(found)
    if tokens > vocab_size:
        raise UserError(
            f"{found} has {tokens} tokens, more than model.vocab_size = {vocab_size}; {GIVE} of"
            " this model"
        )
    return str(found)


def rows(tokenizer: str, run: RunState) -> int | None:
    """How many rows of the vocabulary are tokens; None: all. A conversion may have added some to be divisible."""
    return run.hf_source and max(run.hf_source["vocab_size"], tokenizer_vocab_size(Path(tokenizer)))


def _of_run(checkpoint: Path, run: RunState) -> Path:
    """Beside the checkpoint, where runs and conversions put it; else what the run's configuration names."""
    if (beside := checkpoint.resolve().parent / TOKENIZER).is_dir():
        return beside
    data = run.config.get("data", {})
    if not (named := data.get("tokenizer")):
        raise UserError(
            f"there is no tokenizer beside {checkpoint} (data.kind = {data.get('kind')}); {GIVE}"
        )
    for base in _bases(checkpoint, run):
        if (base / named / "tokenizer.json").is_file():
            return base / named
    raise UserError(f"data.tokenizer = {named} of the run is not there; {GIVE}")


def _bases(checkpoint: Path, run: RunState) -> Iterator[Path]:
    """What the relative paths of the run start from: here, or where it was started, which its run_dir tells."""
    yield Path()
    parts = checkpoint.resolve().parent.parts
    tail = Path(run.config.get("run_dir", "")).parts
    if tail and parts[-len(tail) :] == tail:
        yield Path(*parts[: -len(tail)])
