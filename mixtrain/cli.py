"""Shared by the commands in tools/: exit codes, and argparse types for numbers. No torch."""

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
from mixtrain.system.closed_pipe import run_main

INTERRUPTED = 130
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a tool and return its exit code; user errors print one line each, without a traceback."""
    # SIGTERM raises SystemExit, so that partial output is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run_main(_exit_code, main, argv)


def _exit_code(main: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return main(argv)
    except UserError as error:
        print_problems(error.problems)
        return REFUSED
    except Fault as error:
        print(f"mixtrain: {escaped(str(error), keep=chr(10))}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) or float(text) > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1, such as 0.05")
    return float(text)


def byte_size(text: str) -> int:
    """Bytes, from text such as 5GB, 500MB or 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size; type 5GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)


def directory_size(directory: Path) -> str:
    """Return the size of all files below a directory in readable units, such as `1.2 GB`."""
    return decimal(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()))
