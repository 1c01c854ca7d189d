"""Imports go one way: a wrong configuration is refused without torch, and the package knows nothing of its users."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from composing import ROOT, unstarted_environment

HEAVY = {"torch", "megatron", "numpy", "transformers", "datasets", "tokenizers", "transformer_engine", "matplotlib"}
USERS = {"train", "tools", "tests"}  # they import the package, never the reverse
PACKAGE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "mixtrain").rglob("*.py"))
LIGHT = [
    "train.py",
    *[f"mixtrain/{name}.py" for name in ("compose", "config", "costs", "environment", "errors", "jobs", "layouts")],
    *[f"mixtrain/{name}.py" for name in ("machine", "plan", "report", "status", "data/check")],
    *[name for name in PACKAGE if name.startswith(("mixtrain/config/rules/", "mixtrain/launch/"))],
    "tools/submit.py",
    "mixtrain/checkpoint/megatron_args.py",
]


def imported(path: Path, inside_functions: bool) -> Iterator[str]:
    """Dotted names that a file imports: on import (classes, if and try included), or anywhere in it."""
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)


def files_of(name: str) -> Iterator[Path]:
    """The files of the project that importing `name` runs: the module, and the packages it is in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        base = ROOT.joinpath(*parts[:end])
        yield from (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file())


def reached(path: Path) -> dict[Path, set[str]]:
    """Every file of the project that importing `path` runs, with the names it imports."""
    graph: dict[Path, set[str]] = {}
    waiting = [path]
    while waiting:
        here = waiting.pop()
        if here not in graph:
            graph[here] = set(imported(here, inside_functions=False))
            waiting += [file for name in graph[here] for file in files_of(name)]
    return graph


def test_the_walk_finds_what_a_module_that_needs_torch_reaches():
    graph = reached(ROOT / "mixtrain" / "run.py")
    assert ROOT / "mixtrain" / "rules" / "__init__.py" not in graph  # plan.py imports it in a function
    assert ROOT / "mixtrain" / "costs.py" in graph  # by way of plan.py
    assert "torch" in graph[ROOT / "mixtrain" / "run.py"]


@pytest.mark.parametrize("name", LIGHT)
def test_a_module_that_refuses_configurations_imports_nothing_heavy(name):
    for path, names in reached(ROOT / name).items():
        assert not {dotted.split(".")[0] for dotted in names} & HEAVY, path


@pytest.mark.parametrize("name", PACKAGE)
def test_a_module_that_says_no_torch_keeps_its_word(name):
    if "No torch" in (ast.get_docstring(ast.parse((ROOT / name).read_text())) or ""):
        test_a_module_that_refuses_configurations_imports_nothing_heavy(name)


@pytest.mark.parametrize("name", PACKAGE)
def test_the_package_does_not_import_its_users(name):
    names = imported(ROOT / name, inside_functions=True)
    assert not {dotted.split(".")[0] for dotted in names} & USERS


def test_planning_a_recipe_has_imported_nothing_heavy():
    code = (
        "import sys, train\n"
        "assert train.main(['+recipe=mixtral_8x7b_ep8', 'trainer.mode=plan']) == 0\n"
        "assert train.main(['+recipe=mixtral_8x7b_ep8']) == 2\n"  # the machine's rules
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=unstarted_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "[]"
