"""Between texts and token ids, as transformers' own tokenizer of the directory has it.

Rule: nothing is fetched, and no code that lies beside a tokenizer is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired, TypedDict

from jinja2 import TemplateError
from transformers import AutoTokenizer

from mixtrain import untrusted_json
from mixtrain.data.tokenizer import Id
from mixtrain.errors import UserError

TOKENS_OF_A_CHARACTER = 4  # at most: the bytes of its UTF-8


class GenerationConfig(TypedDict):
    """generation_config.json, as far as it is read."""

    eos_token_id: NotRequired[Id | list[Id] | None]


class Text:
    """A tokenizer, and what ends a text."""

    def __init__(self, directory: str, stop: list[str]):
        """UserError if transformers cannot read the directory."""
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever its files make of it: OSError, ValueError, KeyError, Rust's Exception
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"transformers cannot read the tokenizer {directory}: {reason[0]}") from None
        self.directory, self.stop = directory, stop
        self.tail = TOKENS_OF_A_CHARACTER * (max(map(len, stop), default=0) + 1)

    def ends(self) -> set[int]:
        """The tokens that end a document: the tokenizer's, and those of a generation_config.json beside it."""
        path = Path(self.directory, "generation_config.json")
        more = untrusted_json.read(path, GenerationConfig).get("eos_token_id") if path.exists() else None
        found = {self.tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])}
        return found - {None}

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """The token ids of a prompt, with what the tokenizer puts before it; in its chat template if `chat`."""
        if not chat:
            return self.tokenizer(prompt)["input_ids"]
        if not self.tokenizer.chat_template:
            raise UserError(f"--chat: the tokenizer {self.directory} has no chat template; leave it out")
        said = [{"role": "user", "content": prompt}]
        try:
            text = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise UserError(f"--chat: the chat template of {self.directory} fails: {error}") from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has them

    def stops(self, tokens: list[int]) -> bool:
        """Whether the last of the new tokens has completed a stop text."""
        if not self.stop:
            return False
        tail = self._decode(tokens[-self.tail :])
        return any(stop in tail for stop in self.stop)

    def continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """The text of the new tokens, up to the first stop text."""
        before, whole = self._decode(prompt), self._decode(prompt + tokens)
        # after the prompt's: a tokenizer may drop the space before a text's first word
        text = whole.removeprefix(before) if whole.startswith(before) else self._decode(tokens)
        return text[: min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=len(text))]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
