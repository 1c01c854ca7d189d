"""docs/faults.md names tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from composing import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file, name", NAMED)
def test_a_test_that_the_page_names_is_there(file, name):
    assert name in functions_of(file)


def test_every_row_names_one():
    rows = [
        line
        for line in PAGE.splitlines()
        if line.startswith("| ") and not line.startswith("| What went wrong")
    ]
    assert len(rows) > 60 and all(re.search(r"`tests/[\w/]+\.py::test_\w+`", row) for row in rows)
