"""Counts texts that spell a special token of the tokenizer, as an already rendered chat does."""

from dataclasses import dataclass


@dataclass
class SpelledSpecialTokens:
    """The texts of one block, or of all blocks so far, that spell a special token."""

    texts: int = 0
    first: str = ""

    def add_text(self, token: str, name: str) -> None:
        self.texts += 1
        self.first = self.first or f"`{token}` in {name}"

    def add(self, of_block: "SpelledSpecialTokens") -> None:
        self.texts += of_block.texts
        self.first = self.first or of_block.first

    def message(self, parse_special_tokens: bool) -> str:
        verb = "text spells" if self.texts == 1 else "texts spell"
        count = f"{self.texts:,} {verb} a special token (first: {self.first})"
        if parse_special_tokens:
            return f"{count}, which became that token"
        return f"{count}, which stayed text; --parse-special-tokens makes it the token"
