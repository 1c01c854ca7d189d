"""tools/preprocess_data.py as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from composing import ROOT

TOOL = ROOT / "tools" / "preprocess_data.py"


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The tool as a user runs it from a checkout: nothing on the path, and no network."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
