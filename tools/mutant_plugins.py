"""Pytest plugins of mutants.py: one records the lines each test runs, one runs selected tests."""

from __future__ import annotations

import math
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = 10  # time limit of a test: this plus ten times its time without a fault
PROCESS_EVENTS = ("os.fork", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen")


class TestRun(NamedTuple):
    """Time and coverage of a test in a run without a fault."""

    seconds: float
    lines: set[int]  # of the module: the first lines of the statements that the test runs


class LineRecorder:
    """Pytest plugin that records the lines of a module that each test runs.

    Lines that a fixture runs count for all tests of its file. Tests may not start processes.
    """

    def __init__(self, *, active: bool):
        self.current_lines = set()
        self.lines = {}
        self.fixture_lines = {}
        self.import_lines = self.current_lines  # of functions that run on import
        self.seconds = Counter()
        self.failed = []
        self.started_processes = set()
        self.current_test = "a child" if active else ""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _: tuple) -> None:
        if event in PROCESS_EVENTS and self.current_test:
            self.started_processes.add(self.current_test)
            raise RuntimeError("a test that is to notice a fault starts no process")

    def record_line(self, line: int) -> None:
        self.current_lines.add(line)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self.current_test = item.nodeid
        self.current_lines = self.fixture_lines.setdefault(item.path, set())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item):
        self.current_lines = self.lines.setdefault(item.nodeid, set())

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.lines.pop(report.nodeid, None)
            # a fixture may fail since it may not start processes in another test
            if report.when == "call":
                self.failed.append(report.nodeid)

    def usable_tests(self, root: Path) -> dict[str, TestRun]:
        """Return the tests that pass and start no process."""
        self.current_test = ""
        if failed := [name for name in self.failed if name not in self.started_processes]:
            raise SystemExit(f"mutants: these fail without a fault: {' '.join(failed)}")
        lines_of_file = {
            path.relative_to(root).as_posix(): lines | self.import_lines
            for path, lines in self.fixture_lines.items()
        }
        return {
            name: TestRun(self.seconds[name], lines | lines_of_file[name.split("::")[0]])
            for name, lines in self.lines.items()
        }


class TestSelection:
    """Pytest plugin that runs only these tests, in this order; a hanging test ends the process."""

    def __init__(self, tests: dict[str, TestRun]):
        self.tests = tests
        self.order = {name: number for number, name in enumerate(tests)}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        # replaces the alarm of the previous test
        signal.alarm(SECONDS + math.ceil(10 * self.tests[item.nodeid].seconds))

    def pytest_collection_modifyitems(self, items):
        selected = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(selected, key=lambda item: self.order[item.nodeid])
