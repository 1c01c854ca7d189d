"""What the command lines of tools/ have in common: how they end, and the words that are numbers. No torch."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.filesize import decimal

from mixtrain.characters import escaped
from mixtrain.errors import FAULT, REFUSED, Fault, UserError, print_problems
from mixtrain.system.closed_pipe import ended

INTERRUPTED = 130
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(main: Callable[[list[str]], int], words: list[str]) -> int:
    """The exit code of a tool: what a user can cause is said in a line each, with no traceback."""
    # so that what is half done is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return ended(_coded, main, words)


def _coded(main: Callable[[list[str]], int], words: list[str]) -> int:
    try:
        return main(words)
    except UserError as error:
        print_problems(error.problems)
        return REFUSED
    except Fault as error:
        print(f"mixtrain: {escaped(str(error), keep=chr(10))}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def counted(word: str) -> int:
    """A whole number from 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a whole number from 1")
    return int(word)


def share(word: str) -> float:
    """A part of a whole, from 0 to 1."""
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", word) or float(word) > 1:
        raise argparse.ArgumentTypeError(f"{word} is no share from 0 to 1, as 0.05 is")
    return float(word)


def byte_size(word: str) -> int:
    """Bytes, as in 5GB, 500MB, 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", word)
    unit = UNITS.get(match[2].upper()) if match else None
    if unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"{word} is no size; type 5GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)


def of_size(directory: Path) -> str:
    """The bytes of the files in and below a directory, as one reads them."""
    return decimal(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()))
