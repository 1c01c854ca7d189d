#!/usr/bin/env python3
"""Mutation tests: put small faults into the pure modules, one at a time, and run their tests.

    python tools/mutants.py                         all of MODULES: up to two hours on two cores
    python tools/mutants.py config/rules/experts    a part; --list shows the faults and runs nothing

A fault that no test notices is printed, and is an error unless tests/mutants_accepted.yaml explains
why no test can notice it. The sources are not changed: this process imports their dependencies and
forks a child for each fault, in which the tests import the faulty module.
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
from mutant_plugins import LineRecorder, TestRun, TestSelection
from mutations import RECORD_LINE, Mutant, mutants, record_lines

ROOT = Path(__file__).resolve().parent.parent
ACCEPTED = ROOT / "tests/mutants_accepted.yaml"
RULES = ["tests/config/test_rules.py", "tests/config/test_rules_edges.py"]
CONVERSION = ["tests/checkpoint/test_tensor_reader.py", "tests/interop/test_convert.py"]
READING = ["reading_files", "pickle_edges", "index_edges", "archive_edges", "object_edges"]
# module -> the tests that must notice its faults; tests that start processes are left out
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
    "interop/convert/tensor_mapping": CONVERSION,
    "interop/convert/flat_ranges": CONVERSION,
}
MAX_MEMORY = 8 << 30  # bytes that a faulty module may allocate
# time limit of a fault: this plus ten times the time of its tests without a fault
SECONDS = 20
PR_SET_PDEATHSIG = 1
# exit codes of a child; any other exit code means that the fault was noticed
SURVIVED = 0
KILLED = 1
BROKEN = 70
NO_FAULT = Mutant("", "", "", range(0), 0, lambda node: None)


class ModuleReplacement(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that gives a module other code than its file; `names` are defined before it."""

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


def run_pytest(files: list[str], folder: Path, *plugins: object) -> int:
    options = "-q --tb=no -p no:cacheprovider -o addopts=".split()
    options += ["-m", "not long and not slurm", f"--basetemp={folder}"]
    return pytest.main([*options, *files], plugins=list(plugins))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    sys.stdout.flush()
    saved = [os.dup(stream) for stream in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        for stream, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, stream)


def run_forked(work: Callable[[], int], limit: float | None) -> int | None:
    """Run `work` in a forked child; return its exit code, None after a signal or the time limit.

    The child's process group ends with it.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            os.setsid()
            # the child ends with its parent
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


class ModuleFaults:
    """The faults of a module and the tests that must notice them. Create it in its own process."""

    def __init__(self, module: str, folder: Path):
        self.files = MODULES[module]
        self.folder = folder
        self.path = path_of(module)
        dotted = ".".join(self.path.relative_to(ROOT).with_suffix("").parts)
        self.name = dotted.removesuffix(".__init__")
        self.source = self.path.read_text()
        self.tests = self._run_without_fault()

    def _run_without_fault(self) -> dict[str, TestRun]:
        """Run all tests; what does not depend on the module stays imported and cached."""
        recorder = LineRecorder(active=False)
        code = compile(record_lines(self.source), str(self.path), "exec")
        names = {RECORD_LINE: recorder.record_line}
        replacement = ModuleReplacement(self.name, self.path, code, **names)
        sys.meta_path.insert(0, replacement)
        with silence():
            run_pytest(self.files, self.folder / "tests", recorder)
        sys.meta_path.remove(replacement)
        forget_dependents_of(self.name)
        gc.freeze()
        return recorder.usable_tests(ROOT)

    def tests_of(self, mutant: Mutant) -> dict[str, TestRun]:
        """Return the tests that run the faulty statement, the most specific first.

        Tests that are parametrized with the function's name come before all others.
        """
        parameter = f"[{mutant.function.split('.')[-1]}-"
        lines = {*mutant.lines}

        def order(entry: tuple[str, TestRun]) -> tuple:
            name, test = entry
            return parameter not in name, len(test.lines), test.seconds

        tests = [
            (name, test) for name, test in self.tests.items() if not lines or lines & test.lines
        ]
        return dict(sorted(tests, key=order))

    def survives(self, mutant: Mutant) -> bool:
        tests = self.tests_of(mutant)
        files = [file for file in self.files if any(name.startswith(file) for name in tests)]

        def work() -> int:
            resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
            code = mutant.code(self.source, str(self.path))
            sys.meta_path.insert(0, ModuleReplacement(self.name, self.path, code))
            plugins = TestSelection(tests), LineRecorder(active=True)
            with silence():
                status = run_pytest(["-x", *files], self.folder / "tests", *plugins)
            return SURVIVED if status == 0 else KILLED

        seconds = sum(test.seconds for test in tests.values())
        status = run_forked(work, limit=SECONDS + 10 * seconds) if tests else SURVIVED
        if status == BROKEN:
            raise RuntimeError(f"{mutant.key} could not be tested")
        shutil.rmtree(self.folder / "tests", ignore_errors=True)
        return status == SURVIVED


def forget_dependents_of(name: str) -> None:
    """Remove a module, the modules that import it, and all tests from sys.modules."""
    ours = {key: module for key, module in sys.modules.items() if _is_ours(module)}
    imports = {key: _imported(Path(module.__file__)) for key, module in ours.items()}
    removed = {name}
    tests = {key for key in ours if key.rpartition(".")[2].startswith(("test_", "conftest"))}
    while more := (
        {key for key in ours if key not in removed and imports[key] & removed} | tests - removed
    ):
        removed |= more
    for key in removed & {*sys.modules}:
        package, _, last = key.rpartition(".")
        parent = sys.modules.get(package)
        if parent is not None and last in vars(parent):
            delattr(parent, last)  # `from package import last` looks up the attribute first
        del sys.modules[key]


def _imported(path: Path) -> set[str]:
    """Return the names that a file imports outside functions."""
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
    """Return the numbers of faults, and of those accepted, survived and killed.

    Runs in a child, so that its imports do not reach the next module.
    """
    answer = folder / "answer.json"

    def work() -> int:
        # threads do not survive a fork
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        faults = ModuleFaults(module, folder)
        count = Counter()
        if not faults.survives(NO_FAULT):
            raise RuntimeError("the tests do not pass in a forked child without a fault")
        mutants_of_module = mutants(faults.source)
        for number, mutant in enumerate(mutants_of_module, 1):
            if mutant.key in known:
                result = "accepted"
            else:
                result = "survived" if faults.survives(mutant) else "killed"
            count.update(["faults", result])
            if result == "survived":
                where = f"line {mutant.lines.start}" if mutant.lines else "on import"
                print(
                    f"\r{module}.py, {where}, {mutant.function}:\n"
                    f"    - {mutant.before}\n"
                    f"    + {mutant.after}"
                )
            print(
                f"\r{module}: {number}/{len(mutants_of_module)}, {count['survived']} survived ",
                end="",
                flush=True,
            )
        print()
        answer.write_text(json.dumps(count))
        return 0

    if run_forked(work, limit=None) != 0:
        sys.exit(f"mutants: {module} could not be tested")
    return Counter(json.loads(answer.read_text()))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="parts of module names (default: all modules)")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    args = parser.parse_args(argv)
    modules = [
        name for name in MODULES if not args.modules or any(part in name for part in args.modules)
    ]
    if not modules:
        print(
            f"mutants: none of {', '.join(MODULES)} has {' or '.join(args.modules)} in its name",
            file=sys.stderr,
        )
        return 2
    if args.list:
        for module in modules:
            for mutant in mutants(path_of(module).read_text()):
                print(f"{module} {mutant.function}\n    - {mutant.before}\n    + {mutant.after}")
        return 0
    os.chdir(ROOT)
    known = accepted()
    existing = {mutant.key for module in MODULES for mutant in mutants(path_of(module).read_text())}
    obsolete = [key for key in known if key not in existing]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for module in modules:
            table.append((module, run_module(module, known, Path(folder))))
    print(f"\n{'module':24}{'faults':>8}{'killed':>8}{'accepted':>9}{'survived':>9}")
    total = sum((count for _, count in table), Counter())
    for module, count in [*table, ("all", total)]:
        print(
            f"{module:24}{count['faults']:8}{count['killed']:8}"
            f"{count['accepted']:9}{count['survived']:9}"
        )
    for function, before, after in obsolete:
        print(f"no longer there, take it out of {ACCEPTED.name}: {function}: {before} -> {after}")
    return 1 if total["survived"] or obsolete else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
