"""Find the tokenizer of a checkpoint. No torch.

Rule: it is the tokenizer that the run was trained with or the one that the user gives; never one
that happens to be in a directory.
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


def find_directory(
    given: str | None,
    checkpoint: Path,
    run_state: RunState,
    vocab_size: int,
    allow_other: bool = False,
) -> str:
    """Return the tokenizer's directory.

    UserError if there is none, if it has more tokens than the model, or if the given one is not the
    run's and `allow_other` is false.
    """
    directory = Path(given) if given else _of_run(checkpoint, run_state)
    if given and not allow_other:
        trained_with = None
        # mock data, or a tokenizer that was moved away: there is nothing to compare with
        with suppress(UserError):
            trained_with = _of_run(checkpoint, run_state)
        refuse_other(directory, trained_with, checkpoint)
    tokens = tokenizer_vocab_size(directory)
    if tokens > vocab_size:
        raise UserError(
            f"{directory} has {tokens} tokens, more than model.vocab_size = {vocab_size}; {GIVE} of"
            " this model"
        )
    return str(directory)


def unpadded_rows(tokenizer: str, run_state: RunState) -> int | None:
    """Return how many rows of the vocabulary are not padding; None if all of them."""
    if not run_state.hf_source:
        return None
    return max(run_state.hf_source["vocab_size"], tokenizer_vocab_size(Path(tokenizer)))


def _of_run(checkpoint: Path, run_state: RunState) -> Path:
    """Return the tokenizer beside the checkpoint, else the one that the run names."""
    if (beside := checkpoint.resolve().parent / TOKENIZER).is_dir():
        return beside
    data = run_state.config.get("data", {})
    if not (named := data.get("tokenizer")):
        raise UserError(
            f"there is no tokenizer beside {checkpoint} (data.kind = {data.get('kind')}); {GIVE}"
        )
    for base in _base_directories(checkpoint, run_state):
        if (base / named / "tokenizer.json").is_file():
            return base / named
    raise UserError(f"data.tokenizer = {named} of the run does not exist; {GIVE}")


def _base_directories(checkpoint: Path, run_state: RunState) -> Iterator[Path]:
    """Yield bases of the run's relative paths: this directory, and where the run was started.

    The checkpoint's path without the run's run_dir at its end is where the run was started.
    """
    yield Path()
    parts = checkpoint.resolve().parent.parts
    run_dir = Path(run_state.config.get("run_dir", "")).parts
    if run_dir and parts[-len(run_dir) :] == run_dir:
        yield Path(*parts[: -len(run_dir)])
