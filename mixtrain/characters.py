"""Characters that no key, name, path or value may have, and how a text that has them is shown. No torch.

Rule: a control character never reaches a terminal, a log or a job's script. A line break in a name would be a line of
its own there; an escape code moves the cursor; a direction mark shows a text in another order than it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# C0 and C1 controls, line and paragraph separators, marks that change the direction of a text,
# halves of surrogate pairs (bytes of a command line that are not UTF-8)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str, keep: str = "") -> str:
    """The text with each control character as Python writes it, `\\x1b` say; those in `keep` stay as they are."""
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def problems(key: str, value: object) -> Iterator[str]:
    """A sentence for each text with a control character in `value`, whatever it is made of, or in its key."""
    if found := CONTROL.search(key):
        yield f"the key {escaped(key)} has the control character {escaped(found[0])}; take it out"
    if isinstance(value, dict):
        for name, part in value.items():
            yield from problems(f"{key}.{name}", part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from problems(key, part)
    elif isinstance(value, str) and (found := CONTROL.search(value)):
        yield (
            f"{escaped(key)} = {escaped(value)} has the control character {escaped(found[0])};"
            " take it out"
        )
