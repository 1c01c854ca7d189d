#!/usr/bin/env python3
"""Put small faults into the pure modules, one at a time, and see whether their tests notice.

    python tools/mutants.py                     all of MODULES: up to two hours on two cores
    python tools/mutants.py rules/experts       a part; --list shows the faults and runs nothing

A fault that no test notices is printed, and is an error unless tests/mutants_accepted.yaml says why nothing could
notice it. Nothing is written to the sources: this process has imported what they import, and forks a child for each
fault, in which the faulty module is what its tests import.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
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
from typing import NamedTuple

import pytest
import yaml
from mutations import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
ACCEPTED = ROOT / "tests/mutants_accepted.yaml"
RULES = ["tests/test_rules.py", "tests/test_rules_edges.py"]
CONVERSION = ["tests/test_parts.py", "tests/test_convert.py"]
MODULES = {  # and the tests that are to notice a fault, of which those that start processes are left out
    **{
        f"rules/{name}": RULES
        for name in ("__init__", "experts", "implementation", "layout", "nearest", "training", "upstream")
    },
    "rules/launcher": [*RULES, "tests/launch/test_cluster.py"],
    "plan": ["tests/test_plan.py", "tests/test_schedule.py", "tests/test_recipes.py"],
    "costs": ["tests/test_costs.py", "tests/test_plan.py"],
    "pipeline": ["tests/test_pipeline.py"],
    "checkpoint/boxes": ["tests/test_checkpoint_directory.py"],
    "checkpoint/integrity": ["tests/test_checkpoint_directory.py"],
    "checkpoint/safe": ["tests/test_safe_reading.py"],
    "convert/table": CONVERSION,
    "convert/runs": CONVERSION,
}
PROCESSES = ("os.fork", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen")
MEMORY = 8 << 30  # bytes that a fault may ask for
SURVIVED, KILLED, BROKEN = 0, 1, 2  # exit codes of a child; whatever else it ends with, the fault was noticed


class Test(NamedTuple):
    """What a run without a fault says of a test."""

    seconds: float
    lines: list[int]  # of the module, that it runs


class Watch:
    """A plugin of pytest: which lines of a file each test runs. What a fixture runs counts for all of its file."""

    def __init__(self, path: str):
        self.path, self.here, self.lines, self.shared = path, set(), {}, {}
        self.seconds, self.failed, self.refused = Counter(), [], set()
        sys.addaudithook(self._audit)
        self.current = ""

    def _audit(self, event: str, _: tuple) -> None:
        if event in PROCESSES and self.current:
            self.refused.add(self.current)
            raise RuntimeError("a test that is to notice a fault starts no process")

    def _trace(self, frame, event: str, _):
        if frame.f_code.co_filename != self.path:
            return None
        self.here.add(frame.f_lineno)
        return self._trace

    @contextlib.contextmanager
    def _watched(self, into: set[int]) -> Iterator[None]:
        self.here = into
        sys.settrace(self._trace)
        yield
        sys.settrace(None)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item):
        self.current = item.nodeid
        with self._watched(self.shared.setdefault(item.path, set())):
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        with self._watched(self.lines.setdefault(item.nodeid, set())):
            yield

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)
            self.lines.pop(report.nodeid, None)

    def result(self) -> dict:
        shared = {str(path.relative_to(ROOT)): lines for path, lines in self.shared.items()}
        tests = {
            name: (self.seconds[name], sorted(lines | shared[name.split("::")[0]]))
            for name, lines in self.lines.items()
        }
        outside = [name for name, module in list(sys.modules.items()) if not _is_ours(module)]
        return {
            "tests": tests,
            "failed": [name for name in self.failed if name not in self.refused],
            "outside": outside,
        }


class Choice:
    """A plugin of pytest: these tests alone, in this order."""

    def __init__(self, names: list[str]):
        self.order = {name: number for number, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])


class Faulty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a module another code than its file has."""

    def __init__(self, name: str, path: Path, code):
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        package = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(name, self.path, loader=self, submodule_search_locations=package)
        return spec

    def exec_module(self, module):
        exec(self.code, module.__dict__)


def _is_ours(module) -> bool:
    file = getattr(module, "__file__", None) or ""
    return file.startswith(str(ROOT)) and not file.startswith(str(ROOT / ".venv")) or module.__name__ == "__main__"


def pytest_of(files: list[str], folder: Path, *plugins: object) -> int:
    words = ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-m", "not long and not slurm", f"--basetemp={folder}"]
    return pytest.main([*words, "-o", "addopts=", *files], plugins=list(plugins))


def forked(work: Callable[[], int], limit: float | None) -> int | None:
    """The exit code of `work` in a forked child; None if a signal or the limit ended it. Its group ends with it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = BROKEN
        with contextlib.suppress(BaseException):
            os.setsid()
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(quiet, stream)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            code = work()
        os._exit(code)
    end = time.monotonic() + (limit or float("inf"))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def without_a_fault(path: Path, files: list[str], folder: Path) -> dict[str, Test]:
    """The tests that can notice a fault of a module. Imports here what they import from elsewhere."""
    answer = folder / "answer.json"

    def work() -> int:
        watch = Watch(str(path))
        words = ["-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not long and not slurm", "-o", "addopts="]
        pytest.main([*words, f"--basetemp={folder / 'tests'}", *files], plugins=[watch])
        watch.current = ""
        answer.write_text(json.dumps(watch.result()))
        return 0

    if forked(work, limit=None) != 0 or not answer.exists():
        sys.exit(f"mutants: {' '.join(files)} could not be run")
    found = json.loads(answer.read_text())
    if found["failed"]:
        sys.exit(f"mutants: these fail without a fault: {' '.join(found['failed'])}")
    for name in found["outside"]:
        with contextlib.suppress(BaseException):
            importlib.import_module(name)
    gc.freeze()
    return {name: Test(*test) for name, test in found["tests"].items()}


def chosen(mutant: Mutant, tests: dict[str, Test]) -> list[str]:
    """The tests that run the faulty statement: first those named after its function, then the most particular."""
    reaching = [name for name, test in tests.items() if not mutant.lines or {*mutant.lines} & {*test.lines}]
    own = mutant.function.split(".")[-1]
    return sorted(reaching, key=lambda name: (f"[{own}-" not in name, len(tests[name].lines), tests[name].seconds))


def survives(module: str, mutant: Mutant, files: list[str], names: list[str], seconds: float, folder: Path) -> bool:
    path = path_of(module)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    def work() -> int:
        sys.meta_path.insert(0, Faulty(name, path, mutant.code(path.read_text(), str(path))))
        watch = Watch("")  # refuses processes
        watch.current = "all"
        return SURVIVED if pytest_of(files, folder / "tests", Choice(names)) == 0 else KILLED

    if not names:
        return True
    files = [file for file in files if any(name.startswith(file) for name in names)]
    result = forked(work, limit=20 + 10 * seconds)
    shutil.rmtree(folder / "tests", ignore_errors=True)
    return result == SURVIVED


def path_of(module: str) -> Path:
    return ROOT / "mixtrain" / f"{module}.py"


def accepted() -> dict[tuple[str, str, str], str]:
    entries = yaml.safe_load(ACCEPTED.read_text()) or []
    return {(entry["function"], entry["before"], entry["after"]): entry["why"] for entry in entries}


def run_module(module: str, known: dict, folder: Path) -> tuple[Counter, list[Mutant]]:
    files = MODULES[module]
    tests, found = without_a_fault(path_of(module), files, folder), mutants(path_of(module).read_text())
    count, alive = Counter(faults=len(found)), []
    for number, mutant in enumerate(found, 1):
        if mutant.key in known:
            count["accepted"] += 1
            continue
        names = chosen(mutant, tests)
        seconds = sum(tests[name].seconds for name in names)
        if survives(module, mutant, files, names, seconds, folder):
            alive.append(mutant)
            where = f"{mutant.lines.start}" if mutant.lines else "on import"
            print(f"\r{module}.py:{where} {mutant.function}\n    - {mutant.before}\n    + {mutant.after}", flush=True)
        print(f"\r{module}: {number}/{len(found)}, {len(alive)} survive ", end="", flush=True)
    count["survived"] = len(alive)
    count["killed"] = count["faults"] - count["accepted"] - count["survived"]
    print()
    return count, alive


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="parts of their names (default: all of them)")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    asked = parser.parse_args(words)
    modules = [name for name in MODULES if not asked.modules or any(word in name for word in asked.modules)]
    if not modules:
        print(f"mutants: none of {', '.join(MODULES)} has {' or '.join(asked.modules)} in its name", file=sys.stderr)
        return 2
    if asked.list:
        for module in modules:
            for mutant in mutants(path_of(module).read_text()):
                print(f"{module} {mutant.function}\n    - {mutant.before}\n    + {mutant.after}")
        return 0
    os.nice(19)
    os.chdir(ROOT)
    known = accepted()
    there = {mutant.key for module in MODULES for mutant in mutants(path_of(module).read_text())}
    spare = [key for key in known if key not in there]
    table, survivors = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for module in modules:
            count, alive = run_module(module, known, Path(folder))
            table.append((module, count))
            survivors += len(alive)
    print(f"\n{'module':24}{'faults':>8}{'killed':>8}{'accepted':>9}{'survived':>9}")
    for module, count in [*table, ("all", sum((count for _, count in table), Counter()))]:
        print(f"{module:24}{count['faults']:8}{count['killed']:8}{count['accepted']:9}{count['survived']:9}")
    for function, before, after in spare:
        print(f"no longer there, take it out of {ACCEPTED.name}: {function}: {before} -> {after}")
    return 1 if survivors or spare else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
