"""Plugins of pytest for mutants.py: which lines of a module each test runs, and some tests in an
order.
"""

from __future__ import annotations

import math
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = 10  # that a test may take with a fault beyond ten times what it takes without one
PROCESSES = ("os.fork", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen")


class Test(NamedTuple):
    """What a run without a fault says of a test."""

    seconds: float
    lines: set[int]  # of the module: where the statements begin that it runs


class Watch:
    """A plugin of pytest: which lines of a module each test runs. What a fixture runs counts for
    all of its file.
    """

    def __init__(self, *, active: bool):
        self.here = set()
        self.lines = {}
        self.shared = {}
        self.imported = self.here  # the lines of functions that run on import
        self.seconds = Counter()
        self.failed = []
        self.refused = set()
        self.current = "a child" if active else ""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _: tuple) -> None:
        if event in PROCESSES and self.current:
            self.refused.add(self.current)
            raise RuntimeError("a test that is to notice a fault starts no process")

    def reached(self, line: int) -> None:
        self.here.add(line)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self.current = item.nodeid
        self.here = self.shared.setdefault(item.path, set())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item):
        self.here = self.lines.setdefault(item.nodeid, set())

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.lines.pop(report.nodeid, None)
            # a fixture may have been refused its processes for another test
            if report.when == "call":
                self.failed.append(report.nodeid)

    def tests(self, root: Path) -> dict[str, Test]:
        """Those that pass and start no process."""
        self.current = ""
        if failed := [name for name in self.failed if name not in self.refused]:
            raise SystemExit(f"mutants: these fail without a fault: {' '.join(failed)}")
        shared = {
            path.relative_to(root).as_posix(): lines | self.imported
            for path, lines in self.shared.items()
        }
        return {
            name: Test(self.seconds[name], lines | shared[name.split("::")[0]])
            for name, lines in self.lines.items()
        }


class Choice:
    """A plugin of pytest: these tests alone, in this order. A test that goes on for ever ends the
    process.
    """

    def __init__(self, tests: dict[str, Test]):
        self.tests = tests
        self.order = {name: number for number, name in enumerate(tests)}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        # instead of the test before it
        signal.alarm(SECONDS + math.ceil(10 * self.tests[item.nodeid].seconds))

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted(
            (i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid]
        )
