"""The faults of `make mutants`, and that it says which of them no test notices."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from composing import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import mutants  # noqa: E402
import mutations  # noqa: E402


def faults(source: str) -> list[tuple[str, str, str]]:
    return [fault.key for fault in mutations.mutants(source)]


FAULTS = {  # a source, its faults
    "X = 1": [("X", "1", "2")],
    "X = 'two words'": [],
    "X = ('a',)": [("X", "'a'", "without"), ("X", "('a',)", "('ax',)")],
    "X = {'a': None}": [("X", "'a': None", "without"), ("X", "{'a': None}", "{'ax': None}")],
    "X = 'a b'.split()": [("X", "a", "without"), ("X", "b", "without")],
    "def f(a: int = 1) -> int:\n    'Says.'\n    return a": [
        ("f", "return a", "return None"),
        ("f", "1", "2"),
    ],
    "class C:\n    def f(self):\n        g()\n        g()": [
        ("C.f", "g()", "pass"),
        ("C.f", "g()  # 2", "pass"),
    ],
    "def f(a):\n    if not a:\n        raise a": [
        ("f", "raise a", "pass"),
        ("f", "not a", "not not a"),
    ],
    "def f(a):\n    if a < a:\n        pass": [
        ("f", "if a < a", "if not (a < a)"),
        ("f", "a < a", "a <= a"),
    ],
    "def f(a):\n    g(f'{-a} is said', a or [])": [
        ("f", "g(f'{-a} is said', a or [])", "pass"),
        ("f", "-a", "+a"),
        ("f", "a or []", "a and []"),
        ("f", "a or []", "False or []"),
    ],
    "def f(a):\n    b, c = min(a), [a for b in a if b]\n    return": [
        ("f", "for if b", "for"),
        ("f", "min(a)", "max(a)"),
    ],
}


@pytest.mark.parametrize("source", FAULTS)
def test_a_source_has_the_faults_that_it_should(source):
    assert sorted(faults(source)) == sorted(FAULTS[source])


def test_a_fault_moves_with_its_function():
    source = "def f(a):\n    return a == 1\n"
    assert faults(source) == faults("import os\n\n\ndef g():\n    pass\n\n\n" + source)


@pytest.mark.parametrize("module", mutants.MODULES)
def test_every_fault_of_a_module_compiles_has_a_key_of_its_own_and_tests_that_exist(module):
    source = mutants.path_of(module).read_text()
    found = mutations.mutants(source)
    assert found and len({fault.key for fault in found}) == len(found)
    assert all((ROOT / file).exists() for file in mutants.MODULES[module])
    for fault in found[::10]:
        assert fault.code(source, module)


SMALL = """
def table():
    return ("a",)

TABLE = tuple(table())

def least(a, b):
    return a if a < b else b

def doubled(a):
    while a < 8:
        a += a
    return a
"""
TESTS = """
import os
from mixtrain.small import TABLE, doubled, least

def test_least():
    assert least(1, 2) == 1 and least(2, 1) == 1

def test_doubled():
    assert doubled(1) == 8

def test_that_starts_a_process():
    assert os.system("true") == 0 and TABLE == ("a",)
"""
ACCEPTED = """
- {function: least, before: a < b, after: a <= b, why: of two that are equal either is the least}
- {function: gone, before: a, after: b, why: it was there}
"""


def test_a_run_says_what_survived_what_was_accepted_and_what_is_there_no_more(tmp_path):
    for name in ("mutants.py", "mutations.py", "mutant_plugins.py"):
        (tmp_path / "tools").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools" / name)
    for name, text in {
        "mixtrain/small.py": SMALL,
        "tests/test_small.py": TESTS,
        "tests/mutants_accepted.yaml": ACCEPTED,
        "pytest.ini": "[pytest]\npythonpath = .\nmarkers =\n    long\n    slurm\n",
        "go.py": "import sys\nsys.path.insert(0, 'tools')\nimport mutants, mutant_plugins\n"
        "mutants.SECONDS, mutant_plugins.SECONDS = 60, 1\n"
        "mutants.MODULES = {'small': ['tests/test_small.py']}\nsys.exit(mutants.main([]))\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "go.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout.replace("\r", "\n")
    # the table is looked at by the test alone that starts a process; without `a += a` a loop does
    # not end
    assert "None" not in said  # without a table it cannot be imported, which every test notices
    for survivor in ("- 'a'\n    + without", "- ('a',)\n    + ('ax',)"):
        assert survivor in said
    assert "no longer there, take it out of mutants_accepted.yaml: gone: a -> b" in said
    rows = {
        line.split()[0]: line.split()[1:]
        for line in said.splitlines()
        if line and len(line.split()) == 5
    }
    assert rows["small"] == rows["all"] and rows["small"][2:] == ["1", "2"]
    assert int(rows["small"][0]) == int(rows["small"][1]) + 3
