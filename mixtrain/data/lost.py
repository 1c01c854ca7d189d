"""Documents that are empty or unreadable: counted, the first ones named, and too many of them refused."""

import math
from dataclasses import dataclass, field

from mixtrain.data.items import Unreadable
from mixtrain.errors import UserError

NAMED = 10  # that are printed by name; all of them are counted
# of the items may be unreadable; or so many, where they are less than half of them
SHARE = 0.01
FEW = 2


@dataclass
class Lost:
    """Those of some items, or of all so far."""

    empty: int = 0
    unreadable: int = 0
    # (a line, what it is said once of, or "")
    named: list[tuple[str, str]] = field(default_factory=list)
    first: str = ""  # of the unreadable

    def add_empty(self, name: str) -> None:
        self.empty += 1
        self._name(f"{name}: empty", "")

    def add_unreadable(self, name: str, error: Unreadable) -> None:
        self.unreadable += 1
        self.first = self.first or f"{name}: {error}"
        self._name(f"{name}: {error}", error.once)

    def _name(self, line: str, once: str) -> bool:
        """Whether the line is among those that are named."""
        if len(self.named) > NAMED or (once and any(once == said for _, said in self.named)):
            return False
        self.named.append((line, once))
        return True

    def add(self, more: "Lost", progress) -> None:
        """Count what one block has lost, and print what is named of it."""
        self.empty += more.empty
        self.unreadable += more.unreadable
        self.first = self.first or more.first
        for line, once in more.named:
            if not self._name(line, once):
                continue
            if len(self.named) > NAMED:
                line = "more documents are empty or unreadable; they are counted, not named"
            elif once:
                line += f" (every other item with {once} is counted, not named)"
            progress.complain(line)

    def refuse_too_many(self, documents: int, share: float | None) -> None:
        """UserError if more items are unreadable than the share of all that the user allows, or than the default."""
        items = documents + self.empty + self.unreadable
        few = min(FEW, (items - 1) // 2) if share is None else 0
        allowed = max(few, math.floor((SHARE if share is None else share) * items))
        if self.unreadable > allowed:
            enough = math.ceil(100 * self.unreadable / items) / 100
            raise UserError(
                f"{self.unreadable:,} of {items:,} documents cannot be read, and {allowed:,} may"
                f" be left out; the first is {self.first}; to leave so many out, type"
                f" --max-unreadable {enough:g}"
            )
