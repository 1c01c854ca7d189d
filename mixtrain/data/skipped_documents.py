"""Empty and unreadable documents: counts them, reports the first ones, and refuses too many."""

import math
from dataclasses import dataclass, field

from mixtrain.data.documents import UnreadableDocument
from mixtrain.errors import UserError

REPORTED = 10  # documents printed by name; all of them are counted
# This share of the documents may be unreadable; or this many, if that is less than half of them.
MAX_UNREADABLE_SHARE = 0.01
FEW = 2


@dataclass
class SkippedDocuments:
    """The skipped documents of one block, or of all blocks so far."""

    empty: int = 0
    unreadable: int = 0
    # (line, group of UnreadableDocument or "")
    reported: list[tuple[str, str]] = field(default_factory=list)
    first_unreadable: str = ""

    def add_empty(self, name: str) -> None:
        self.empty += 1
        self._report(f"{name}: empty", "")

    def add_unreadable(self, name: str, error: UnreadableDocument) -> None:
        self.unreadable += 1
        self.first_unreadable = self.first_unreadable or f"{name}: {error}"
        self._report(f"{name}: {error}", error.group)

    def _report(self, line: str, group: str) -> bool:
        """Add the line to those reported; return False if it is not reported."""
        is_known = group and any(group == known for _, known in self.reported)
        if is_known or len(self.reported) > REPORTED:
            return False
        self.reported.append((line, group))
        return True

    def add(self, of_block: "SkippedDocuments", progress) -> None:
        """Add the documents that one block skipped, and print those that are reported."""
        self.empty += of_block.empty
        self.unreadable += of_block.unreadable
        self.first_unreadable = self.first_unreadable or of_block.first_unreadable
        for line, group in of_block.reported:
            if not self._report(line, group):
                continue
            if len(self.reported) > REPORTED:
                line = "more documents are empty or unreadable; they are counted, not named"
            elif group:
                line += f" (every other item with {group} is counted, not named)"
            progress.complain(line)

    def refuse_too_many(self, documents: int, max_share: float | None) -> None:
        """Raise UserError if the share of unreadable documents is too large.

        `documents` is the number of readable ones; `max_share` None is the default limit.
        """
        total = documents + self.empty + self.unreadable
        few = min(FEW, (total - 1) // 2) if max_share is None else 0
        share = MAX_UNREADABLE_SHARE if max_share is None else max_share
        allowed = max(few, math.floor(share * total))
        if self.unreadable > allowed:
            sufficient = math.ceil(100 * self.unreadable / total) / 100
            raise UserError(
                f"{self.unreadable:,} of {total:,} documents cannot be read, and {allowed:,} may"
                f" be left out; the first is {self.first_unreadable}; to leave so many out, type"
                f" --max-unreadable {sufficient:g}"
            )
