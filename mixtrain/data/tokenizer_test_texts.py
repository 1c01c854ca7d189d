"""Generated texts that two tokenizers of one vocabulary encode differently if their merges differ.

Rule: no text spells a special token, since tokenizers treat those differently on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator

WORDS = (
    "return",
    "The capital of France",
    "größer",
    "日本語のテキスト",
    "Ελληνικά",
    "שלום",
    "emoji 🙂👩‍👩‍👧",
    "e\u0301o\u0308",
)
LINES = (
    "def f(x):",
    "    if x > 1:",
    "\treturn [x] * 3",
    "        # no\u00a0break",
    "",
    "    else:\t",
    "  pass  ",
)
CHARACTERS = (
    "=-_#*.,:;!?/\\'\"()[]{}<>@%&|~^$+0189azAZ\n"
    "\t\r\u2581\u00a0\u2028\ufeff\u200d\x00\x7fé日🙂\U0010fffd"
)


def tokenizer_test_texts() -> list[str]:
    """Return each text once: indented code, runs of a character, numbers, scripts, spaces."""
    return list(dict.fromkeys(_texts()))


def _texts() -> Iterator[str]:
    for spaces in range(48):
        yield " " * spaces + "return"
        yield "a" + " " * spaces + "b" + " " * (spaces // 3)
    for character in CHARACTERS:
        yield character
        yield f"x {character}{character} y"
        yield character * 17
    for word in WORDS:
        yield from (
            word,
            f" {word}",
            f"{word} ",
            f"  {word}  {word}",
            word * 9,
            f"\u2581{word}",
            f"{word}\n\n\t{word}",
        )
    for number in (0, 7, 42, 1999, 3.14159, 10**12, 123456789.5e-3):
        yield f"{number}"
        yield f"{number:,} = {number!r}\t{number};"
    for depth in range(1, 13):
        yield "\n".join(" " * (4 * depth) + line for line in LINES)
        yield "\r\n".join("\t" * depth + line for line in LINES)
    yield "".join(map(chr, range(0x20, 0x250)))
