"""Texts that spell a special token of the tokenizer, as a chat does that was rendered before: counted and said."""

from dataclasses import dataclass


@dataclass
class Spelled:
    """Those of some texts, or of all so far."""

    texts: int = 0
    first: str = ""

    def add(self, token: str, name: str) -> None:
        self.texts += 1
        self.first = self.first or f"`{token}` in {name}"

    def join(self, more: "Spelled") -> None:
        self.texts = self.texts + more.texts
        self.first = self.first or more.first

    def words(self, parse: bool) -> str:
        """What is said of them."""
        what = (
            f"{self.texts:,} text{' spells' if self.texts == 1 else 's spell'} a special token"
            f" (first: {self.first})"
        )
        if parse:
            return f"{what}, and it is one"
        return f"{what}, which stayed text; --parse-special-tokens makes it the token"
