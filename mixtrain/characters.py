"""Control characters: refuse them in keys, names, paths and values; print them escaped. No torch.

Rule: a control character never reaches a terminal, a log or a job script. A line break would start
a new line there, an escape code moves the cursor, a direction mark displays text out of order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# C0 and C1 controls, line and paragraph separators, direction marks, unpaired surrogates (the bytes
# of a command line that are not UTF-8)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str, keep: str = "") -> str:
    """Return text with control characters as Python escapes (`\\x1b`), except those in `keep`."""
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def problems(key: str, value: object) -> Iterator[str]:
    """Yield a sentence for each control character in `key`, or in a text anywhere in `value`."""
    if match := CONTROL.search(key):
        yield f"the key {escaped(key)} has the control character {escaped(match[0])}; take it out"
    if isinstance(value, dict):
        for name, item in value.items():
            yield from problems(f"{key}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from problems(key, item)
    elif isinstance(value, str) and (match := CONTROL.search(value)):
        yield (
            f"{escaped(key)} = {escaped(value)} has the control character {escaped(match[0])};"
            " take it out"
        )
