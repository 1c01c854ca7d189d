"""Encode prompts and decode continuations, with the tokenizer.json of training and export.

Rule: nothing is downloaded. Of the files beside a tokenizer, only a chat template runs, in
transformers' sandbox.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mixtrain.data.special_tokens import chat_template, ends_of_text, special_tokens
from mixtrain.data.tokenizer import load_tokenizer
from mixtrain.errors import UserError

MAX_TOKENS_PER_CHARACTER = 4  # the bytes of its UTF-8


class PromptTokenizer:
    """A tokenizer, and the stop texts that end a continuation."""

    def __init__(self, directory: str, stop_texts: list[str]):
        """UserError if the directory has no tokenizer or a damaged one."""
        self.directory = Path(directory)
        self.stop_texts = stop_texts
        self.tokenizer = load_tokenizer(self.directory, parse_special_tokens=True)
        self.special_tokens = special_tokens(self.directory)
        longest_stop = max(map(len, stop_texts), default=0)
        # tokens that may hold a stop text, whose first character may begin within a token
        self.stop_window = MAX_TOKENS_PER_CHARACTER * (longest_stop + 1)

    def end_tokens(self) -> set[int]:
        """Return the ids that end a document: the tokenizer's, and generation_config.json's."""
        eos = self.tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return {*([] if eos is None else [eos]), *ends_of_text(self.directory)}

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """Return the token ids of a prompt, with the special tokens that the tokenizer adds.

        `chat`: format the prompt with the chat template, which has the special tokens.
        """
        text = self._format_chat(prompt) if chat else prompt
        return self.tokenizer.encode(text, add_special_tokens=not chat).ids

    def _format_chat(self, prompt: str) -> str:
        """Return a prompt as the first user message in the chat template."""
        template = chat_template(self.directory)
        if not template:
            raise UserError(
                f"--chat: the tokenizer {self.directory} has no chat template; leave it out"
            )
        messages = [{"role": "user", "content": prompt}]
        try:
            (text,), _ = render_jinja_template(
                [messages],
                chat_template=template,
                add_generation_prompt=True,
                **self.special_tokens,
            )
        except TemplateError as error:
            raise UserError(
                f"--chat: the chat template of {self.directory} fails: {error}"
            ) from None
        return text

    def has_stop_text(self, tokens: list[int]) -> bool:
        """Whether the last of the new tokens completes a stop text."""
        if not self.stop_texts:
            return False
        tail = self._decode(tokens[-self.stop_window :])
        return any(stop in tail for stop in self.stop_texts)

    def continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """Return the text of the new tokens, up to the first stop text."""
        # decoded with the prompt: a tokenizer may drop the space before a text's first word
        prompt_text = self._decode(prompt)
        text = self._decode(prompt + tokens)
        if text.startswith(prompt_text):
            text = text.removeprefix(prompt_text)
        else:
            text = self._decode(tokens)
        ends = [place for stop in self.stop_texts if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
