"""The pages about conversion and generation show commands that the tools have."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from composing import ROOT

PAGES = ["README.md", "docs/convert.md", "docs/generate.md"]


def commands() -> list[list[str]]:
    """The words of every `python tools/...` command of the pages."""
    found = []
    for page in PAGES:
        for block in re.findall(
            r"```console\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL
        ):
            lines = block.replace("\\\n", " ").splitlines()
            found += [shlex.split(line[2:]) for line in lines if line.startswith("$ python tools/")]
    return found


@cache
def help_of(tool: str) -> str:
    done = subprocess.run(
        [sys.executable, tool, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[13:60])
def test_a_command_names_options_that_its_tool_has(words):
    options = [word for word in words if word.startswith("--")]
    assert all(
        f" {option}" in help_of(words[1]) or f"[{option}" in help_of(words[1]) for option in options
    )
    assert "Exit codes" in help_of(words[1]) or not words[1].startswith("tools/convert")


def test_the_page_of_conversion_lists_every_damage_and_architecture():
    from mixtrain.config.families import FAMILIES
    from mixtrain.interop.convert import layer_comparison

    text = (ROOT / "docs" / "convert.md").read_text()
    assert all(family.class_name in text for family in FAMILIES.values())
    assert len(layer_comparison.DAMAGES) == 6 and "in six ways" in text
    assert (
        f"{layer_comparison.TOLERANCES[next(iter(layer_comparison.TOLERANCES))]:.0e}".replace(
            "e-0", "e-"
        )
        in text
        and str(layer_comparison.MIN_COSINE) in text
    )
