"""A request to generate: prompts, how tokens are chosen, when to stop. No torch.

Rule: everything that can be refused without a tokenizer is refused here, before a rank starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

from mixtrain.errors import UserError
from mixtrain.system import untrusted_json

NAME = "request.json"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the model's probabilities."""

    temperature: float = 0.0  # divides the logits; 0 takes the likeliest token
    top_k: int | None = None  # choose among the k likeliest tokens
    # choose among the likeliest tokens that together have this probability (Holtzman et al. 2020)
    top_p: float | None = None
    seed: int = 0
    # choose ids below this only: higher ids are padding of the vocabulary; None: all ids
    vocabulary: int | None = None

    def problems(self) -> Iterator[str]:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            yield (
                f"--temperature {self.temperature:g} must be 0, which takes the likeliest"
                " token, or above"
            )
        if self.top_k is not None and self.top_k < 1:
            yield f"--top-k {self.top_k} must be at least 1"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--top-p {self.top_p:g} must be above 0 and at most 1"
        if not 0 <= self.seed < 2**63:
            yield f"--seed {self.seed} must be from 0 to {2**63 - 1}"
        if self.temperature == 0:
            for name, value in (("--top-k", self.top_k), ("--top-p", self.top_p)):
                if value is not None:
                    yield (
                        f"{name} {value:g} chooses nothing at --temperature 0; add --temperature 1"
                    )


@dataclass(frozen=True)
class Request:
    """What the ranks need beside the plan."""

    prompts: list[str]
    tokenizer: str  # a Hugging Face directory
    sampling: Sampling
    max_new_tokens: int
    stop: list[str]  # texts
    chat: bool  # each prompt is a user message in the tokenizer's chat template
    batch_size: int  # prompts at a time in each data-parallel replica
    as_json: bool

    def problems(self) -> Iterator[str]:
        if not self.prompts:
            yield "there is no prompt; give --prompt TEXT or --prompt-file FILE"
        for number, prompt in enumerate(self.prompts, start=1):
            if not prompt:
                yield f"prompt {number} is empty; there is nothing to continue"
        if self.max_new_tokens < 1:
            yield f"--max-new-tokens {self.max_new_tokens} must be at least 1"
        if self.batch_size < 1:
            yield f"--batch-size {self.batch_size} must be at least 1"
        if "" in self.stop:
            yield "--stop '' is in every text; leave it out"
        yield from self.sampling.problems()

    def for_model(self, tokenizer: str, vocabulary: int | None) -> Request:
        """Return the request with a model's tokenizer and number of unpadded vocabulary rows."""
        sampling = replace(self.sampling, vocabulary=vocabulary)
        return replace(self, tokenizer=tokenizer, sampling=sampling)

    def write(self, folder: str | Path) -> None:
        Path(folder, NAME).write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: str | Path) -> Request:
        values = untrusted_json.read(Path(folder, NAME), most=1 << 32)
        return Request(**{**values, "sampling": Sampling(**values["sampling"])})


class Prompt(TypedDict):
    """A line of a .jsonl file of prompts."""

    prompt: str


def read_prompts(path: str) -> list[str]:
    """Read one prompt per line, or the `prompt` of each object of a .jsonl file.

    Empty lines are skipped. UserError if the file cannot be read or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: not UTF-8 at byte {error.start}") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompt-file {path}: it has no prompt")
    if path.endswith(".jsonl"):
        where = f"--prompt-file {path}, line"
        return [_parse_prompt(f"{where} {number}", line) for number, line in numbered]
    return [line for _, line in numbered]


def _parse_prompt(where: str, line: str) -> str:
    try:
        return untrusted_json.parse(line, Prompt, only="prompt")["prompt"]
    except untrusted_json.InvalidJson as error:
        raise UserError(
            f'{where}: {error}; a line is an object with a text under "prompt"'
        ) from None
