#!/usr/bin/env python3
"""Put small faults into the pure modules, one at a time, and see whether their tests notice.

    python tools/mutants.py                         all of MODULES: up to two hours on two cores
    python tools/mutants.py config/rules/experts    a part; --list shows the faults and runs nothing

A fault that no test notices is printed, and is an error unless tests/mutants_accepted.yaml says why
nothing could notice it. Nothing is written to the sources: this process has imported what they
import, and forks a child for each fault, in which the faulty module is what its tests import.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import gc
import importlib.abc
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType

import pytest
import yaml
from mutations import REACHED, Mutant, mutants, telling
from watching import Choice, Test, Watch

ROOT = Path(__file__).resolve().parent.parent
ACCEPTED = ROOT / "tests/mutants_accepted.yaml"
RULES = ["tests/config/test_rules.py", "tests/config/test_rules_edges.py"]
CONVERSION = ["tests/checkpoint/test_tensor_reader.py", "tests/interop/test_convert.py"]
READING = ["reading_files", "pickle_edges", "index_edges", "archive_edges", "object_edges"]
# and the tests that are to notice a fault, of which those that start processes are left out
MODULES = {
    **{
        f"config/rules/{name}": RULES
        for name in (
            "__init__",
            "data",
            "experts",
            "implementation",
            "layout",
            "memory",
            "nearest",
            "training",
            "upstream",
        )
    },
    "config/rules/unread": [*RULES, "tests/config/test_unread.py"],
    "config/rules/launcher": [*RULES, "tests/launch/test_cluster.py"],
    "config/plan": ["tests/config/test_plan.py", "tests/config/test_plan_edges.py"],
    "config/lr_schedule": ["tests/config/test_schedule.py"],
    "config/activations": ["tests/config/test_plan.py"],
    "config/memory": [
        "tests/config/test_costs.py",
        "tests/config/test_plan.py",
        "tests/config/test_plan_edges.py",
    ],
    "config/pipeline_split": ["tests/config/test_pipeline.py"],
    "checkpoint/slices": ["tests/checkpoint/test_checkpoint_directory.py"],
    "checkpoint/integrity": ["tests/checkpoint/test_checkpoint_directory.py"],
    **{
        f"checkpoint/{name}": [f"tests/checkpoint/test_{file}.py" for file in READING]
        for name in ("safe", "pickles", "metadata", "archive")
    },
    "interop/convert/table": CONVERSION,
    "interop/convert/spans": CONVERSION,
}
MEMORY = 8 << 30  # bytes that a fault may ask for
# that a fault may take to be imported, and beyond ten times what its tests take without it
SECONDS = 20
PR_SET_PDEATHSIG = 1
# exit codes of a child; whatever else it ends with, the fault was noticed
SURVIVED = 0
KILLED = 1
BROKEN = 70
NO_FAULT = Mutant("", "", "", range(0), 0, lambda node: None)


class Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a module another code than its file has. `names` are in it beforehand."""

    def __init__(self, name: str, path: Path, code: CodeType, **names: object):
        self.name = name
        self.path = path
        self.code = code
        self.names = names

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        package = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self, submodule_search_locations=package
        )

    def exec_module(self, module):
        module.__dict__.update(self.names)
        exec(self.code, module.__dict__)


def pytest_of(files: list[str], folder: Path, *plugins: object) -> int:
    words = [
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-m",
        "not long and not slurm",
        "-o",
        "addopts=",
    ]
    return pytest.main([*words, f"--basetemp={folder}", *files], plugins=list(plugins))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    sys.stdout.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        for stream, own in zip((1, 2), kept, strict=True):
            os.dup2(own, stream)


def forked(work: Callable[[], int], limit: float | None) -> int | None:
    """The exit code of `work` in a forked child; None if a signal or the limit ended it. Its group
    ends with it.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            os.setsid()
            # whoever ends the parent ends this one too
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            code = work()
        except BaseException as error:
            print(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + limit if limit else float("inf")
    try:
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                return None
            time.sleep(0.01)
        return os.WEXITSTATUS(ended[1]) if os.WIFEXITED(ended[1]) else None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


class Faults:
    """The faults of a module, and the tests that are to notice them.

    To be made in a process of its own.
    """

    def __init__(self, module: str, folder: Path):
        self.files = MODULES[module]
        self.folder = folder
        self.path = path_of(module)
        self.name = ".".join(self.path.relative_to(ROOT).with_suffix("").parts).removesuffix(
            ".__init__"
        )
        self.source = self.path.read_text()
        self.tests = self._without_a_fault()

    def _without_a_fault(self) -> dict[str, Test]:
        """Leaves imported, and cached, what does not depend on the module."""
        watch = Watch(active=False)
        code = compile(telling(self.source), str(self.path), "exec")
        instead = Instead(self.name, self.path, code, **{REACHED: watch.reached})
        sys.meta_path.insert(0, instead)
        with silence():
            pytest_of(self.files, self.folder / "tests", watch)
        sys.meta_path.remove(instead)
        forget_dependents_of(self.name)
        gc.freeze()
        return watch.tests(ROOT)

    def chosen(self, mutant: Mutant) -> dict[str, Test]:
        """The tests that run the faulty statement: first those named after its function, then the
        most particular.
        """
        own = f"[{mutant.function.split('.')[-1]}-"
        lines = {*mutant.lines}
        reaching = {
            name: test for name, test in self.tests.items() if not lines or lines & test.lines
        }
        return dict(
            sorted(
                reaching.items(), key=lambda of: (own not in of[0], len(of[1].lines), of[1].seconds)
            )
        )

    def survives(self, mutant: Mutant) -> bool:
        tests = self.chosen(mutant)
        files = [file for file in self.files if any(name.startswith(file) for name in tests)]

        def work() -> int:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            sys.meta_path.insert(
                0, Instead(self.name, self.path, mutant.code(self.source, str(self.path)))
            )
            with silence():
                ended = pytest_of(
                    ["-x", *files], self.folder / "tests", Choice(tests), Watch(active=True)
                )
            return SURVIVED if ended == 0 else KILLED

        seconds = sum(test.seconds for test in tests.values())
        ended = forked(work, limit=SECONDS + 10 * seconds) if tests else SURVIVED
        if ended == BROKEN:
            raise RuntimeError(f"{mutant.key} could not be tried")
        shutil.rmtree(self.folder / "tests", ignore_errors=True)
        return ended == SURVIVED


def forget_dependents_of(name: str) -> None:
    """As if a module, what imports it and all tests had never been imported."""
    ours = {key: module for key, module in sys.modules.items() if _is_ours(module)}
    imports = {key: _imported(Path(module.__file__)) for key, module in ours.items()}
    gone = {name}
    tests = {key for key in ours if key.rpartition(".")[2].startswith(("test_", "conftest"))}
    while more := {key for key in ours if key not in gone and imports[key] & gone} | tests - gone:
        gone |= more
    for key in gone & {*sys.modules}:
        package, _, last = key.rpartition(".")
        parent = sys.modules.get(package)
        if parent is not None and last in vars(parent):
            delattr(parent, last)  # `from package import last` looks there first
        del sys.modules[key]


def _imported(path: Path) -> set[str]:
    """The names that a file imports, but for those that a function does when it is called."""
    nodes = list(ast.parse(path.read_text()).body)
    names = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return names


def _is_ours(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None) or ""
    outside = (str(ROOT / ".venv"), str(ROOT / "tools"))
    return file.startswith(str(ROOT)) and not file.startswith(outside)


def path_of(module: str) -> Path:
    return ROOT / "mixtrain" / f"{module}.py"


def accepted() -> dict[tuple[str, str, str], str]:
    entries = yaml.safe_load(ACCEPTED.read_text()) or []
    return {(entry["function"], entry["before"], entry["after"]): entry["why"] for entry in entries}


def run_module(module: str, known: dict, folder: Path) -> Counter:
    """Faults, and those that are accepted, survived and killed.

    In a child: it imports what the next must not have.
    """
    answer = folder / "answer.json"

    def work() -> int:
        # threads do not come along when it forks
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        faults = Faults(module, folder)
        count = Counter()
        if not faults.survives(NO_FAULT):
            raise RuntimeError("the tests do not pass in a forked child without a fault")
        found = mutants(faults.source)
        for number, mutant in enumerate(found, 1):
            fate = (
                "accepted"
                if mutant.key in known
                else "survived"
                if faults.survives(mutant)
                else "killed"
            )
            count.update(["faults", fate])
            if fate == "survived":
                where = f"line {mutant.lines.start}" if mutant.lines else "on import"
                print(
                    f"\r{module}.py, {where}, {mutant.function}:\n"
                    f"    - {mutant.before}\n"
                    f"    + {mutant.after}"
                )
            print(
                f"\r{module}: {number}/{len(found)}, {count['survived']} survived ",
                end="",
                flush=True,
            )
        print()
        answer.write_text(json.dumps(count))
        return 0

    if forked(work, limit=None) != 0:
        sys.exit(f"mutants: {module} could not be done")
    return Counter(json.loads(answer.read_text()))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="parts of their names (default: all of them)")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    asked = parser.parse_args(words)
    modules = [
        name for name in MODULES if not asked.modules or any(word in name for word in asked.modules)
    ]
    if not modules:
        print(
            f"mutants: none of {', '.join(MODULES)} has {' or '.join(asked.modules)} in its name",
            file=sys.stderr,
        )
        return 2
    if asked.list:
        for module in modules:
            for mutant in mutants(path_of(module).read_text()):
                print(f"{module} {mutant.function}\n    - {mutant.before}\n    + {mutant.after}")
        return 0
    os.chdir(ROOT)
    known = accepted()
    there = {mutant.key for module in MODULES for mutant in mutants(path_of(module).read_text())}
    spare = [key for key in known if key not in there]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for module in modules:
            table.append((module, run_module(module, known, Path(folder))))
    print(f"\n{'module':24}{'faults':>8}{'killed':>8}{'accepted':>9}{'survived':>9}")
    all_of_them = sum((count for _, count in table), Counter())
    for module, count in [*table, ("all", all_of_them)]:
        print(
            f"{module:24}{count['faults']:8}{count['killed']:8}{count['accepted']:9}{count['survived']:9}"
        )
    for function, before, after in spare:
        print(f"no longer there, take it out of {ACCEPTED.name}: {function}: {before} -> {after}")
    return 1 if all_of_them["survived"] or spare else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
