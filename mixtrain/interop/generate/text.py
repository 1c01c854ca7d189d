"""Between texts and token ids, by the same tokenizer.json as training and an exported model.

Rule: nothing is fetched, and of what lies beside a tokenizer only a chat template is run, in
transformers' sandbox.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mixtrain.data.special_tokens import chat_template, ends_of_text, special_tokens
from mixtrain.data.tokenizer import load_tokenizer
from mixtrain.errors import UserError

TOKENS_OF_A_CHARACTER = 4  # at most: the bytes of its UTF-8


class Text:
    """A tokenizer, and what ends a text."""

    def __init__(self, directory: str, stop: list[str]):
        """UserError if the directory holds no tokenizer, or a damaged one."""
        self.directory = Path(directory)
        self.stop = stop
        self.tokenizer = load_tokenizer(self.directory, parse_special_tokens=True)
        self.named = special_tokens(self.directory)
        self.tail = TOKENS_OF_A_CHARACTER * (max(map(len, stop), default=0) + 1)

    def ends(self) -> set[int]:
        """The tokens that end a document: the tokenizer's, and those of a generation_config.json beside it."""
        eos = self.tokenizer.token_to_id(self.named.get("eos_token", ""))
        return {*([] if eos is None else [eos]), *ends_of_text(self.directory)}

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """The token ids of a prompt, with what the tokenizer puts before it; in its chat template if `chat`."""
        text = self._chat(prompt) if chat else prompt
        return self.tokenizer.encode(text, add_special_tokens=not chat).ids  # a template has them

    def _chat(self, prompt: str) -> str:
        """A prompt as a user's first words in the chat template."""
        template = chat_template(self.directory)
        if not template:
            raise UserError(
                f"--chat: the tokenizer {self.directory} has no chat template; leave it out"
            )
        said = [{"role": "user", "content": prompt}]
        try:
            (text,), _ = render_jinja_template(
                [said], chat_template=template, add_generation_prompt=True, **self.named
            )
        except TemplateError as error:
            raise UserError(
                f"--chat: the chat template of {self.directory} fails: {error}"
            ) from None
        return text

    def stops(self, tokens: list[int]) -> bool:
        """Whether the last of the new tokens has completed a stop text."""
        if not self.stop:
            return False
        tail = self._decode(tokens[-self.tail :])
        return any(stop in tail for stop in self.stop)

    def continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """The text of the new tokens, up to the first stop text."""
        before = self._decode(prompt)
        whole = self._decode(prompt + tokens)
        # after the prompt's: a tokenizer may drop the space before a text's first word
        text = whole.removeprefix(before) if whole.startswith(before) else self._decode(tokens)
        return text[
            : min(
                (place for stop in self.stop if (place := text.find(stop)) >= 0), default=len(text)
            )
        ]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
