"""Imports go one way: a wrong configuration is refused without torch, and the package knows nothing
of its users.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from composing import ROOT, unstarted_environment

HEAVY = {
    "torch",
    "megatron",
    "numpy",
    "transformers",
    "datasets",
    "tokenizers",
    "transformer_engine",
    "matplotlib",
}
USERS = {"train", "tools", "tests"}  # they import the package, never the reverse
PACKAGE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "mixtrain").rglob("*.py"))
LIGHT = [
    "train.py",
    *[name for name in PACKAGE if name.startswith(("mixtrain/config/", "mixtrain/launch/"))],
    *[
        f"mixtrain/{name}.py"
        for name in ("errors", "system/rank_identity", "system/status", "data/check")
    ],
    "tools/submit.py",
    "mixtrain/checkpoint/megatron_args.py",
]


def imported(path: Path, inside_functions: bool) -> Iterator[str]:
    """Dotted names that a file imports: on import (classes, if and try included), or anywhere in
    it.
    """
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        ):
            nodes += ast.iter_child_nodes(node)


def files_of(name: str) -> Iterator[Path]:
    """The project's files that importing `name` runs: the module and its packages."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        base = ROOT.joinpath(*parts[:end])
        yield from (
            path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()
        )


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
    graph = reached(ROOT / "mixtrain" / "training" / "worker.py")
    # planner.py alone imports it
    assert ROOT / "mixtrain" / "config" / "rules" / "__init__.py" not in graph
    assert ROOT / "mixtrain" / "config" / "memory.py" in graph  # by way of config/plan.py
    assert "torch" in graph[ROOT / "mixtrain" / "training" / "worker.py"]


# From what may import everything to what imports nothing. A room imports those behind it, and never
# one before it.
ROOMS = """
    commands cli proof interop launch training checkpoint data engine config system
    errors characters paths
""".split()
BESIDE = {("data", "engine")}  # neither knows the other


def modules_of_the_package() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, in functions too; without the package's own
    name.
    """
    names = {
        path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in PACKAGE
    }
    found: dict[str, set[str]] = {}
    for path, name in names.items():
        dotted = set(imported(ROOT / path, inside_functions=True)) & set(names.values())
        # `from package import module` names both; of a package's own file only what is taken of it
        # alone counts
        found[name] = {one for one in dotted if one != "mixtrain"} - {name}
    return found


def test_every_module_is_in_a_room():
    assert {name.split(".")[1] for name in modules_of_the_package() if "." in name} == set(ROOMS)


def test_rooms_import_in_one_direction():
    for name, needed in modules_of_the_package().items():
        for other in needed:
            here, there = (ROOMS.index(dotted.split(".")[1]) for dotted in (name, other))
            assert here <= there, f"{name} imports {other}"
            assert (ROOMS[here], ROOMS[there]) not in BESIDE, f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    graph = modules_of_the_package()
    packages = {name for name in graph if (ROOT / name.replace(".", "/")).is_dir()}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in graph[name] - {
                package for package in packages if name.startswith(f"{package}.")
            }:
                walk(other, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


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
